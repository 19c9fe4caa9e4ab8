"""A PostgreSQL server for the tests, on loopback."""

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PASSWORD = "s3cret?"


@dataclass(frozen=True)
class Server:
    """Where it is; its user and database are both ``postgres``."""

    folder: Path
    port: int

    def url(self, password="s3cret%3F", port=None, database="postgres"):
        user = f"postgres:{password}" if password else "postgres"
        return f"postgresql+psycopg://{user}@127.0.0.1:{port or self.port}/{database}"

    def control(self, *what):
        """Start, stop or restart it by ``pg_ctl``."""
        options = f"-p {self.port} -k {self.folder} -h 127.0.0.1 -c fsync=off"
        log = self.folder / "log"
        _call("pg_ctl", "-w", "-D", self.folder / "data", "-l", log, "-o", options, *what)


@contextmanager
def running():
    """Run a server; skip the test if PostgreSQL is not installed."""
    if _program("initdb") is None:
        pytest.skip("PostgreSQL's programs are not installed")
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a short name: it holds a socket
    (folder / "password").write_text(PASSWORD)
    if os.geteuid() == 0:  # it refuses to run as root
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = Server(folder, free.getsockname()[1])
    login = ["-U", "postgres", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}"]
    _call("initdb", "-D", folder / "data", "--no-sync", *login)
    server.control("start")
    try:
        yield server
    finally:
        server.control("stop", "-m", "immediate")
        shutil.rmtree(folder)


def _program(name):
    newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))[-1:]
    return shutil.which(name) or next(map(str, newest), None)


def _call(name, *arguments):
    command = [str(part) for part in (_program(name), *arguments)]
    if os.geteuid() == 0:
        command = ["su", "postgres", "-s", "/bin/sh", "-c", shlex.join(command)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")
