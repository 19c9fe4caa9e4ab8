"""From a study to live objects: models, tasks, memory and cost."""
