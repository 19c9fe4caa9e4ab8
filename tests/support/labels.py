"""A user's objective for classifiers: texts, each labelled by its first letter."""

import random
import string

import torch

from objectives.base import Item, ItemResult, ItemSnapshot


class Labels:
    def __init__(self, model, tokenizer):
        draw = random.Random(0)
        self.texts = ["".join(draw.sample(string.ascii_lowercase, 6)) for _ in range(40)]
        self.tasks = {"labels": 1.0}
        self.items = [Item("labels", text, row) for row, text in enumerate(self.texts)]
        self.tokenizer = tokenizer

    def snapshots(self, items):
        return [ItemSnapshot(self.texts[number], str(self._label(number))) for number in items]

    def score(self, model, items):
        texts = [self.texts[number] for number in items]
        tokens = torch.tensor([self.tokenizer(text)["input_ids"] for text in texts])
        found = model(tokens).logits.argmax(-1).tolist()
        return [
            ItemResult(float(label == self._label(number)))
            for number, label in zip(items, found, strict=True)
        ]

    def _label(self, number):
        return int(self.texts[number][0] > "m")
