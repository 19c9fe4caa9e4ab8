"""Six task families of the Open LLM Leaderboard v2: lm-eval's task files, invented documents."""

from __future__ import annotations

import contextlib
import json
import random

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from objectives.harness.task_index import LM_EVAL_TASKS
from tiny_models import make_model, make_tokenizer
from tiny_tasks import everything, prepare, write_rows

DOCUMENTS = 10
DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices("abcdefgh", k=DRAW.randint(3, 8))) for _ in range(300)]


def words(row: int, count: int) -> list[str]:
    return WORDS[row * 7 : row * 7 + count]


def bbh(row):
    return {"input": f"not {words(row, 1)[0]} is", "target": ["True", "False"][row % 2]}


def gpqa(row):
    wrong = {f"Incorrect Answer {n}": word for n, word in enumerate(words(row, 3), start=1)}
    return {"Question": words(row, 4)[3], "Correct Answer": words(row, 5)[4], **wrong}


def musr(row):
    return {
        "narrative": " ".join(words(row, 6)),
        "question": "Who?",
        "choices": str(words(row, 2 + row % 2)),
        "answer_choice": words(row, 1)[0],
    }


def mmlu_pro(row):
    options = words(row, 3 + row % 4)
    return {"question": words(row, 7)[6], "options": options, "answer": "ABC"[row % 3]}


def math_hard(row):
    # The model of this task generates only 5s: it is correct in every second row.
    gold = "5" * 24 if row % 2 else str(row)
    return {
        "problem": f"What is {words(row, 1)[0]}?",
        "solution": f"It is $\\boxed{{{gold}}}$.",
        "level": "Level 5" if row else "Level 4",
        "type": "Algebra",
    }


def ifeval(row):
    options = {"keywords": None, "num_words": None, "relation": None, "language": None}
    instructions = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"num_words": 90, "relation": "at least"}),
        ("keywords:existence", {"keywords": ["5"]}),
        ("detectable_format:json_format", {}),
        ("language:response_language", {"language": "de"}),
    ]
    name, own = instructions[row % 5]
    prompt = f"Write {words(row, 1)[0]}."
    return {
        "key": row,
        "prompt": prompt,
        "instruction_id_list": [name],
        "kwargs": [options | own],
    }


# Task file within lm-eval's folder, metric, documents, and the splits to be made of them.
FAMILIES = {
    "bbh": ("bbh_mc/boolean_expressions.yaml", "acc_norm", bbh, ["test"]),
    "gpqa": ("gpqa/gpqa_diamond_zeroshot.yaml", "acc_norm", gpqa, ["train"]),
    "musr": ("musr/musr_murder_mysteries.yaml", "acc_norm", musr, ["test"]),
    "mmlu_pro": ("mmlu_pro/mmlu_pro.yaml", "acc", mmlu_pro, ["test", "validation"]),
    "math_hard": ("math/math_algebra.yaml", "exact_match", math_hard, ["test", "train"]),
    "ifeval": ("ifeval/ifeval.yaml", "prompt_level_strict_acc", ifeval, ["train"]),
}


def write_family(folder, family):
    file, _, document, splits = FAMILIES[family]
    included = LM_EVAL_TASKS / "leaderboard" / file
    write_rows(folder / f"{family}.jsonl", [document(row) for row in range(DOCUMENTS)])
    config = {
        "include": str(included),
        "task": family,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": dict.fromkeys(splits, f"{family}.jsonl")},
    }
    if family == "musr":
        config["test_split"] = "test"
    if family in ("math_hard", "ifeval"):  # as theirs, but for the length
        until = ["Problem:"] if family == "math_hard" else []
        config["generation_kwargs"] = {"until": until, "do_sample": False, "max_gen_toks": 24}
    (folder / f"{family}.yaml").write_text(yaml.safe_dump(config))


def model_and_tokenizer(family):
    model = make_model(max_position_embeddings=4096)
    if family in ("math_hard", "ifeval"):  # all logits equal: it always writes its first token
        model.model.norm.weight.data.zero_()
        return model, make_tokenizer(first="5")
    return model, make_tokenizer()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_lm_evals_own_values(family, tmp_path, monkeypatch):
    for package in {"math_hard": ["math_verify"], "ifeval": ["langdetect"]}.get(family, []):
        pytest.importorskip(package, reason="needs the extra 'leaderboard'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "data")
    write_family(tmp_path, family)
    metric = FAMILIES[family][1]
    model, tokenizer = model_and_tokenizer(family)
    language_model = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float32"
    )
    with contextlib.chdir(tmp_path):
        results = simple_evaluate(
            language_model,
            tasks=[family],
            task_manager=TaskManager(include_defaults=False, include_path=str(tmp_path)),
            bootstrap_iters=0,
        )
    samples = sorted(results["samples"][family], key=lambda sample: sample["doc_id"])
    theirs = [float(sample[metric]) for sample in samples]
    model, tokenizer = model_and_tokenizer(family)
    harness = prepare(tmp_path, model, family, tokenizer=tokenizer)
    answers = harness.score(model, everything(harness))
    assert [answer.value for answer in answers] == theirs
    assert {answer.fault for answer in answers} == {None}
    assert len(set(theirs)) > 1, "the test would pass on a constant"
    labels = harness.targets(everything(harness))
    if family == "math_hard":
        golds = [sample["doc"]["answer"] for sample in samples]
        assert [label.strip() for label in labels] == golds
    else:  # the metric judges IFEval's placeholder "0" right where JSON is asked for
        assert set(labels) == ({None} if family == "ifeval" else {""})
    prompts = [each.prompt for each in harness.snapshots(everything(harness))]
    sent = [sample["arguments"][0][0] for sample in samples]
    assert all(prompt.startswith(text) for prompt, text in zip(prompts, sent, strict=True))
    rows = [json.loads(each.gold)["row"] for each in harness.snapshots(everything(harness))]
    assert rows == [sample["doc"] for sample in samples]
