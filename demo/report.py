"""What the demo shows at the end: how often each kind of row was trained, losses on the test split, and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pyarrow as pa
import torch
from datasets import Dataset
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from peft import PeftModel
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .data import GROUPS, Row

matplotlib.use("Agg")

COLOURS = {"target": "#1b7f5c", "corrupted": "#d1603d", "off-target": "#7a7f9a"}
"""Group of rows → its colour in the picture."""

IGNORED = -100  # label of a token that is not supervised


@dataclass(frozen=True)
class KindDraws:
    """How often the rows of one kind were trained.

    `token_share` is the kind's share of the supervised tokens, which is its share of a run that trains every row once;
    `trained_share` is its share of the tokens that were trained. Both in 0 to 1.
    """

    kind: str
    draws: list[int]
    token_share: float
    trained_share: float

    @property
    def mean(self) -> float:
        return sum(self.draws) / len(self.draws)


def draws_by_kind(scores: pa.Table, kinds: Sequence[str]) -> list[KindDraws]:
    """Group how often rows were trained, by kind of row.

    Args:
        scores: the columns `row`, `draws` and `tokens` (supervised tokens of the row) of a run's `scores.parquet`.
        kinds: the kind of each train row; `row` is an index into it.
    """
    columns = scores.select(["row", "draws", "tokens"]).to_pydict()
    rows = [(kinds[row], draws, tokens) for row, draws, tokens in zip(*columns.values())]
    tokens = sum(tokens for _, _, tokens in rows)
    trained = sum(draws * tokens for _, draws, tokens in rows)
    return [
        KindDraws(
            kind=kind,
            draws=[draws for _, draws, _ in own],
            token_share=sum(tokens for _, _, tokens in own) / tokens,
            trained_share=sum(draws * tokens for _, draws, tokens in own) / trained,
        )
        for kind in GROUPS
        if (own := [row for row in rows if row[0] == kind])
    ]


def encode(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    """Tokens and labels of a row in the tokenizer's chat template; the assistant's turn alone is supervised."""
    prompt, whole = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=generate, return_dict=True)["input_ids"]
        for messages, generate in ((row.messages[:1], True), (row.messages, False))
    )
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)  # the template may go on after the turn's end
    return whole, [token if len(prompt) <= position < end else IGNORED for position, token in enumerate(whole)]


def match_kinds(prepared: Dataset, scores: pa.Table, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Find the kind of each row of the host's train dataset by its tokens.

    Args:
        prepared: the train dataset as the host tokenised it (`input_ids`, `labels`).
        scores: the run's scores; their count of supervised tokens must be that of `prepared`, row by row,
            which shows that the trainer's row numbers are those of `prepared`.
        rows: the generated rows, in any order.

    Raises:
        ValueError: a row of `prepared` was never generated, or the two orders differ.
    """
    kind_of = {tuple(encode(tokenizer, row)[0]): row.kind for row in rows}
    lengths = [sum(label != IGNORED for label in labels) for labels in prepared["labels"]]
    for row, tokens in zip(scores["row"].to_pylist(), scores["tokens"].to_pylist()):
        if lengths[row] != tokens:
            raise ValueError(f"row {row}: {tokens} supervised tokens in the scores, {lengths[row]} in the prepared data")
    try:
        return [kind_of[tuple(tokens)] for tokens in prepared["input_ids"]]
    except KeyError as error:
        raise ValueError(f"not a generated row: {tokenizer.decode(error.args[0])!r}") from None


@torch.no_grad()
def test_losses(model: str, adapters: dict[str, Path], rows: Sequence[Row], batch_size: int = 8) -> dict[str, float]:
    """Evaluate adapters alike: each on the float32 base model, over the same rows.

    Args:
        model: folder or hub id of the base model.
        adapters: name → folder of a saved adapter.
        rows: the test split.

    Returns:
        Name → mean negative log-likelihood of a supervised token, in nats.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = sorted((encode(tokenizer, row) for row in rows), key=lambda pair: len(pair[0]))
    losses = {}
    for name, adapter in adapters.items():
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        policy = PeftModel.from_pretrained(base, adapter).eval()
        total = count = 0
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            longest = len(batch[-1][0])
            ids, labels, mask = (
                torch.tensor([values + [fill] * (longest - len(values)) for values in column])
                for column, fill in (
                    ([tokens for tokens, _ in batch], tokenizer.eos_token_id),
                    ([labels for _, labels in batch], IGNORED),
                    ([[1] * len(tokens) for tokens, _ in batch], 0),
                )
            )
            supervised = int((labels[:, 1:] != IGNORED).sum())
            total += policy(input_ids=ids, attention_mask=mask, labels=labels).loss.item() * supervised
            count += supervised
        losses[name] = total / count
    return losses


def draws_table(kinds: Sequence[KindDraws]) -> Table:
    table = Table(
        title="How often the rows of each kind were trained",
        caption="share trained: of the supervised tokens that were trained; a run that trains every row once has the share of tokens",
    )
    table.add_column("group")
    table.add_column("kind")
    for header in ("rows", "never", "once", "more often", "mean", "share of tokens", "share trained"):
        table.add_column(header, justify="right")
    for kind in kinds:
        table.add_row(
            GROUPS[kind.kind],
            kind.kind,
            str(len(kind.draws)),
            *(str(count) for count in _counts(kind)),
            f"{kind.mean:.2f}",
            f"{kind.token_share:.0%}",
            f"{kind.trained_share:.0%}",
        )
    return table


def _counts(kind: KindDraws) -> tuple[int, int, int]:
    """Rows trained never, once and more often."""
    return kind.draws.count(0), kind.draws.count(1), sum(draws > 1 for draws in kind.draws)


def losses_table(losses: dict[str, float]) -> Table:
    """Table of test losses in nats per token; the first one is what the others are compared with."""
    table = Table(title="Loss on the test split of the target task (nats per supervised token, float32)")
    table.add_column("adapter")
    table.add_column("test loss", justify="right")
    table.add_column("change", justify="right")
    before = next(iter(losses.values()))
    for name, loss in losses.items():
        table.add_row(name, f"{loss:.4f}", "" if loss == before else f"{loss - before:+.4f}")
    return table


def plot_draws(kinds: Sequence[KindDraws], path: Path) -> None:
    """Draw a bar for each kind, of the shares of its rows trained never, once and more often, and save the picture as PNG."""
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(kinds) + 1.8), layout="constrained")
    for position, kind in enumerate(kinds):
        left = 0.0
        for count, opacity in zip(_counts(kind), (0.12, 0.45, 1.0)):
            share = count / len(kind.draws)
            axes.barh(position, share, left=left, height=0.7, color=COLOURS[GROUPS[kind.kind]], alpha=opacity)
            if count:
                axes.text(
                    left + share / 2, position, str(count), ha="center", va="center", color="white" if opacity == 1 else "black"
                )
            left += share
    axes.set_yticks(range(len(kinds)), [f"{kind.kind} ({len(kind.draws)} rows)" for kind in kinds])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the kind's rows")
    axes.set_title("Rows trained never (light), once, more often (dark);\nwithout the block: every row once")
    handles = [Patch(color=colour, label=group) for group, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
