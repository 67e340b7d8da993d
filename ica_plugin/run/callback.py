"""When to score, what to log, and which weight a batch gets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from ..config import ICAConfig
from ..data.holdout import Holdout
from ..data.store import Example, scored_tokens
from ..errors import ICAError
from ..log import get_logger
from ..policy.engine import Engine
from ..policy.memory import budget_for
from ..policy.model import model_context
from ..policy.reference import reference_of
from ..scorers import CONTRACT_COLUMNS, balanced_score, scores_for_sets
from ..scorers.context import ScoringContext
from ..training.injection import GradientInjection
from ..weighting.retrieval import report_fewer, retrieve
from ..weighting.weights import Weights, weights_from_scores
from .budget import Allowance, Budgeted
from .files import RunFiles
from .look_ahead import LookAhead
from .state import State, differences, fingerprint, load_state, save_state

# Weights within fewer rows than this say little.
FEW_ROWS = 16


class ICACallback(TrainerCallback):
    """Scores rows with the current policy, keeps their weights, and reports.

    Args:
        trainer: the host's.
        config: the block.
        train: every row of `trainer.train_dataset`, in its order.
        holdout: checked holdout; None with given weights.
        given: float64 [n] weights that replace scoring.
        length_normalize: mean log-probs for pairs.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: ICAConfig,
        train: list[Example],
        holdout: Holdout | None,
        *,
        given: np.ndarray | None,
        length_normalize: bool,
    ):
        self.trainer = trainer
        self.config = config
        self.train = train
        self.holdout = holdout
        self.length_normalize = length_normalize
        self.weights = torch.full((len(train),), torch.nan)
        self.scores = torch.full((len(train),), torch.nan, dtype=torch.float64)
        self.tokens = scored_tokens(train)
        self.files = RunFiles(trainer.args.output_dir)
        self.scores_itself = given is None
        self._given = given
        self.refreshes = 0
        self.scored_rows = 0
        self.weighted_rows = 0
        self.scoring_seconds = 0.0
        self._demonstrations: list[list[int]] | None = None
        self._injection: GradientInjection | None = None
        self._engine: Engine | None = None
        self._kept: dict[str, Any] = {}  # what scorers keep between refreshes
        self._started = 0.0
        self._due = False
        self._last_refresh_step = 0
        self._interval: int | None = None
        self._mid_epoch = False
        self._resumed: State | None = None
        self._trained_before = 0.0
        self._scored_here = 0.0
        self._ahead = LookAhead(trainer.accelerator.gradient_state, trainer.args.device)
        self._budgeted: Budgeted | None = None
        self._neighbour_correlation: float | None = None
        if given is not None:
            self.weights = torch.from_numpy(given).float()

    # When: the trainer's events decide, `before_update` acts.

    def on_train_begin(self, args, state, control, **kwargs):
        if self._injection is not None:  # the trainer starts over, as after auto_find_batch_size
            self._injection.remove()
        self._injection = GradientInjection(self.trainer.model)
        if self._engine is not None and self._engine.model is not self.trainer.model:  # `model_init` made another
            self._engine, self._demonstrations, self._kept = None, None, {}
        self._started, self._scored_here = time.monotonic(), 0.0
        self._due = self.scores_itself
        self._interval = self.config.interval_steps(state.max_steps)
        self._mid_epoch = False
        if self._resumed is not None:
            # A checkpoint at an epoch's end goes on with the next one, and so does a run that skips no data.
            self._mid_epoch = state.epoch % 1 > 0 and not args.ignore_data_skip
            self._continue(self._resumed)
            self._resumed = None
        if self.scores_itself and self.config.budget is not None:
            self._budgeted = self._within_budget(state, kwargs.get("train_dataloader"))
        if not self.scores_itself:
            self._report_given()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._ahead.clear()
        if self._mid_epoch:
            self._mid_epoch = False
        elif self.config.refresh_interval == "epoch" or self._by_window:
            self._due = self.scores_itself

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.injection.check_gradients()

    def on_step_end(self, args, state, control, **kwargs):
        if self._interval and state.global_step - self._last_refresh_step >= self._interval:
            self._due = self.scores_itself

    def on_train_end(self, args, state, control, **kwargs):
        self._write_run()

    @property
    def _by_window(self) -> bool:
        return self._interval is not None and self.config.refresh_scope == "window"

    @property
    def _rows_per_step(self) -> int:
        """Rows of the trainer's dataset, packed or not, in an optimizer step, over all processes."""
        trainer = self.trainer
        return trainer._train_batch_size * trainer.args.gradient_accumulation_steps * trainer.accelerator.num_processes

    def _warn_of_small_window(self, rows: int) -> None:
        if rows < min(FEW_ROWS, len(self.train)):
            get_logger().warning(
                "ica.refresh_interval: a window is %d row(s), and rows are weighted against the others of their window alone%s. Take a longer "
                "`refresh_interval`, or `refresh_scope: all`.",
                rows,
                ": every weight is 1, and nothing is reweighted" if rows == 1 else "",
            )

    def before_update(self, batches: Iterator[dict], micro_batches: int) -> Iterator[dict]:
        """Refresh if one is due, before the micro-batches of the next optimizer step are taken.

        With `refresh_scope: window` the batches of the coming interval are drawn ahead and exactly their rows are
        scored; the batches are handed on unchanged and in order.

        Args:
            batches: the trainer's epoch iterator.
            micro_batches: micro-batches per optimizer step.

        Returns:
            The iterator to take the micro-batches from.
        """
        if self._due:
            self._due = False
            self._last_refresh_step = self.trainer.state.global_step
            if self._by_window:
                steps = min(self._interval, self.trainer.state.max_steps - self.trainer.state.global_step)
                self._ahead.draw(batches, steps * micro_batches)
                if self.refreshes == 0 and steps == self._interval:
                    self._warn_of_small_window(len(self._ahead.rows) * self.trainer.accelerator.num_processes)
                self.refresh(self._ahead.rows, shared=False, steps=steps)
            else:
                self.refresh(list(range(len(self.train))), shared=True, steps=self._interval)
        return self._ahead.hand_on(batches) if self._ahead else batches

    # What: scores, weights, records.

    def refresh(self, rows: list[int], *, shared: bool, steps: int | None = None) -> None:
        """Score rows with the current policy and give them new weights; collective over all ranks.

        Args:
            rows: indices of train rows.
            shared: every rank passes the same rows and scores its share; otherwise each rank passes its own.
            steps: optimizer steps that the weights serve, for `budget`; None: an epoch or the rest of the run.
        """
        begin = time.monotonic()
        accelerator = self.trainer.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        if self._budgeted is not None:
            self._budgeted.allowance.open(self.trainer.state.global_step, self._serves_until(steps))
        elif self._demonstrations is None:
            everyone = self._on_all_ranks(lambda: self.find_demonstrations(list(range(rank, len(self.train), ranks))))
            self._demonstrations = [[] for _ in self.train]
            for first, part in enumerate(everyone):
                self._demonstrations[first::ranks] = part
            if self.config.shows_demonstrations:
                report_fewer(self._demonstrations, self.config.k, len(self.holdout.shown))
        mine = rows[rank::ranks] if shared else rows
        parts = self._on_all_ranks(lambda: self._score(mine) if self._budgeted is None else self._score_within_budget(mine))
        if self._budgeted is not None:
            self._demonstrations = self._demonstrations or [[] for _ in self.train]
            for row, demos in (item for part in parts for item in part.pop("demos").items()):
                self._demonstrations[row] = demos
        index, first = np.unique(np.concatenate([part["row"] for part in parts]), return_index=True)
        if len(index) == 0:
            return
        columns = {name: np.concatenate([part[name] for part in parts])[first] for name in parts[0]}
        if self._budgeted is None:
            columns["score"] = balanced_score(self.config, columns)
        scored = columns.setdefault("scored", np.ones(len(index), bool))
        weights = self._weigh(columns)
        self.weights[torch.from_numpy(index)] = torch.from_numpy(weights.values).float()
        self.scores[torch.from_numpy(index[scored])] = torch.from_numpy(columns["score"][scored])
        seconds = time.monotonic() - begin
        self.scoring_seconds += seconds
        self._scored_here += seconds
        if self._budgeted is not None:
            self._budgeted.allowance.close()
        self.scored_rows += int(scored.sum())
        self.weighted_rows += len(index)
        self._report(columns, weights, seconds)
        if accelerator.is_main_process:
            count = len(index)
            self.files.add_scores(
                {
                    "row": index,
                    "refresh": np.full(count, self.refreshes),
                    "step": np.full(count, self.trainer.state.global_step),
                    "base_logprob": columns["base"],
                    "context_logprob": columns["context"],
                    "score": columns["score"],
                    "weight": weights.values,
                    "tokens": self.tokens[index],
                    "demos": [self._demonstrations[row] if now else [] for row, now in zip(index, scored, strict=True)],
                    **{
                        name: columns[name]
                        for name in columns
                        if name not in CONTRACT_COLUMNS and columns[name] is not columns["score"]
                    },
                }
            )
        self.refreshes += 1
        self._write_run()

    def _on_all_ranks(self, work: Any) -> list[Any]:
        """Run `work` here and return every rank's result; if one rank fails, all stop with its error."""
        if self.trainer.accelerator.num_processes == 1:
            return [work()]
        result = error = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        gathered = gather_object([(result, None if error is None else repr(error))])
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                raise ICAError(f"scoring failed on rank {rank}: {failure}")
        return [part for part, _ in gathered]

    def find_demonstrations(
        self, rows: list[int], config: ICAConfig | None = None, holdout: Holdout | None = None
    ) -> list[list[int]]:
        """Indices of the holdout rows that each train row is shown, k of each set, by the policy as it is now.

        Args:
            rows: indices of train rows.
            config: with another choice of demonstrations than the run's.
            holdout: to look among other rows than the run's.
        """
        config = config or self.config
        if not config.shows_demonstrations:
            return [[] for _ in rows]
        tokenizer, embed = self.trainer.processing_class, self._get_engine().embeddings
        if self._budgeted is not None:
            embed = partial(self._budgeted.embed, embeddings=embed)
            holdout = holdout or self._budgeted.holdout
        holdout = holdout or self.holdout
        demonstrations = [
            retrieve(
                self.train,
                holdout.only(name),
                config,
                rows=rows,
                context=model_context(self.trainer.model),
                embed=embed,
                decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
            )
            for name in holdout.sets
        ]
        return [sum(of_sets, []) for of_sets in zip(*demonstrations, strict=True)]

    def _score(self, rows: list[int]) -> dict[str, np.ndarray]:
        sequences = 2 * sum(len(self.train[row].sequences) for row in rows if self.train[row].can_be_scored)
        with tqdm(
            total=sequences if self.config.score == "ica" else None,
            desc="ICA scoring",
            unit="seq",
            leave=False,
            disable=not self.trainer.is_local_process_zero(),
        ) as bar:
            demonstrations = [self._demonstrations[row] for row in rows]
            scores = scores_for_sets(self.scoring_context(rows, demonstrations, bar.update))
            return {"row": np.array(rows, dtype=np.int64), **scores}

    def scoring_context(
        self, rows: list[int], demonstrations: list[list[int]], progress: Any = lambda done: None
    ) -> ScoringContext:
        """What scorers see of the policy as it is now, for `rows` of the train set and the demonstrations of each."""
        return ScoringContext(
            engine=self._get_engine(),
            config=self.config,
            train=self.train,
            rows=rows,
            demonstrations=demonstrations,
            holdout=self.holdout,
            length_normalize=self.length_normalize,
            reference=reference_of(self.trainer),
            beta=float(getattr(self.trainer, "beta", None) or getattr(self.trainer.args, "beta", None) or 0.1),
            limit=model_context(self.trainer.model),
            optimizer=self.trainer.optimizer,
            kept=self._kept,
            progress=progress,
        )

    def _weigh(self, columns: dict[str, np.ndarray]) -> Weights:
        rows = columns["row"]
        neutral = np.array([self.config.shows_demonstrations and not self._demonstrations[row] for row in rows])
        if self._budgeted is None:
            return weights_from_scores(
                columns["score"], self.config, tokens=self.tokens[rows], by_token=self.train[0].kind == "sft", neutral=neutral
            )
        scored = columns["scored"]
        before = np.flatnonzero(np.isfinite(self.scores.numpy()))  # a resumed run's among them
        self._budgeted.neighbours.add(before, self.scores.numpy()[before], np.zeros(len(before), bool))
        self._budgeted.neighbours.add(rows[scored], columns["score"][scored], neutral[scored])
        weights, self._neighbour_correlation = self._budgeted.neighbours.weigh(rows)
        return weights

    # `budget`: see budget.py.

    def _within_budget(self, state, loader) -> Budgeted:
        args, ranks = self.trainer.args, self.trainer.accelerator.num_processes
        rows = len(self.train) / (len(loader) * ranks) if loader is not None else args.per_device_train_batch_size
        allowance = Allowance(self.config.budget, state.global_step, state.max_steps)
        micro_batch = min(args.per_device_train_batch_size, len(self.train))
        return Budgeted(self.config, self.train, self.holdout, allowance, rows * args.gradient_accumulation_steps, micro_batch)

    def _serves_until(self, steps: int | None) -> int:
        state = self.trainer.state
        if steps is None:
            epochs = self.trainer.args.num_train_epochs if self.config.refresh_interval == "epoch" else 1
            steps = state.max_steps if epochs <= 1 else round(state.max_steps / epochs)
        return min(state.global_step + steps, state.max_steps)

    def _score_within_budget(self, rows: list[int]) -> dict[str, Any]:
        def retrieve_rows(chosen: list[int]) -> list[list[int]]:
            self._demonstrations = self._demonstrations or [[] for _ in self.train]
            for row, demos in zip(chosen, self.find_demonstrations(chosen), strict=True):
                self._demonstrations[row] = demos
            return [self._demonstrations[row] for row in chosen]

        def score(chosen: list[int]) -> dict[str, np.ndarray]:
            columns = self._score(chosen)
            return {**columns, "score": columns["ica"]}

        return self._budgeted.score(rows, self._get_engine(), retrieve_rows, score)

    def _get_engine(self) -> Engine:
        if self._engine is None:
            args, model = self.trainer.args, self.trainer.model
            largest = max(sum(len(sequence.tokens) for sequence in row.sequences) for row in self.train)
            self._engine = Engine(
                model,
                device=args.device,
                autocast=self.trainer.accelerator.autocast,
                budget=budget_for(model.config, args.device, args.per_device_train_batch_size * largest),
            )
        return self._engine

    # What a checkpoint keeps.

    def save_state(self, folder: str) -> None:
        """Write what a resumed run needs into a checkpoint's folder; the plugin draws no random numbers of its own."""
        if not self.trainer.args.should_save:
            return
        tensors = {"weights": self.weights, "scores": self.scores}
        if self._demonstrations is not None:
            shown = torch.full((len(self.train), max([1, *map(len, self._demonstrations)])), -1, dtype=torch.int32)
            for row, demos in enumerate(self._demonstrations):
                shown[row, : len(demos)] = torch.tensor(demos, dtype=torch.int32)
            tensors["demonstrations"] = shown
        record = {
            "step": self.trainer.state.global_step,
            "refreshes": self.refreshes,
            "scored_rows": self.scored_rows,
            "weighted_rows": self.weighted_rows,
            "scoring_seconds": self.scoring_seconds,
            "training_seconds": self._training_seconds(),
            "due": self._due,
            "last_refresh_step": self._last_refresh_step,
            "rows_per_step": self._rows_per_step,
            "fingerprint": self._fingerprint,
        }
        save_state(folder, State(tensors, record))

    def load_state(self, folder: str) -> None:
        """Take over the state of the checkpoint that the trainer resumes from; collective over all ranks.

        Raises:
            ICAError: the state belongs to another run (with `on_resume_mismatch: error`), or is damaged.
        """
        main = self.trainer.accelerator.is_main_process
        state = self._on_all_ranks(lambda: load_state(folder) if main else None)[0]
        if state is None:
            get_logger().warning("%s has no ICA state, so all rows are scored again with the policy as it is there.", folder)
            return
        changed = differences(state.record["fingerprint"], self._fingerprint)
        if changed and self.config.on_resume_mismatch == "error":
            raise ICAError(
                f"{folder} was written by another run; what differs: {', '.join(changed)}. Undo the change, start without "
                "resuming, or set `on_resume_mismatch: rescore` to go on and score all rows again."
            )
        if changed:
            get_logger().warning("%s differs in %s; all rows are scored again.", folder, ", ".join(changed))
            return
        self._resumed = state

    def _continue(self, state: State) -> None:
        record = state.record
        self.weights, self.scores = state.tensors["weights"].clone(), state.tensors["scores"].clone()
        if "demonstrations" in state.tensors:
            self._demonstrations = [[demo for demo in row if demo >= 0] for row in state.tensors["demonstrations"].tolist()]
        self.refreshes, self.scored_rows, self.weighted_rows = record["refreshes"], record["scored_rows"], record["weighted_rows"]
        self.scoring_seconds, self._trained_before = record["scoring_seconds"], record["training_seconds"]
        self._last_refresh_step = record["last_refresh_step"]
        self._due = record["due"]
        if self._by_window and record.get("rows_per_step", self._rows_per_step) != self._rows_per_step:
            # The host goes on with other rows than those that were scored ahead.
            get_logger().warning("another number of rows per step than in the checkpoint: the coming rows are scored anew.")
            self._due = True
        if self.trainer.accelerator.is_main_process and self.scores_itself:
            self.files.keep_scores(self.refreshes)
        get_logger().info("resumed at step %d with the weights of %d refresh(es).", record["step"], self.refreshes)

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.config, self.train, self.holdout, self._given, self.trainer.model)

    def _training_seconds(self) -> float:
        """Seconds of this run so far without scoring, those before a resume included."""
        return self._trained_before + max(time.monotonic() - self._started - self._scored_here, 0.0)

    # Which weight a batch gets.

    def training_weights(self, rows: torch.Tensor) -> torch.Tensor:
        """The newest weights of a batch.

        Args:
            rows: int64 [B] or [B, T] row ids; padding has a negative id and weight 0.

        Returns:
            float32, same shape.

        Raises:
            ICAError: a row has no weight yet.
        """
        ids = rows.cpu()
        weights = torch.where(ids >= 0, self.weights[ids.clamp(min=0)], torch.zeros(()))
        if torch.isnan(weights).any():
            unknown = ids[torch.isnan(weights)].unique().tolist()
            raise ICAError(f"rows {unknown[:5]} are about to be trained but were never scored; the run stops here.")
        return weights

    @property
    def injection(self) -> GradientInjection:
        """The hook on the policy; there from the start of training on."""
        if self._injection is None:
            raise ICAError("a training step ran outside `trainer.train()`, before any row was scored.")
        return self._injection

    # What a person reads.

    def _report(self, columns: dict[str, np.ndarray], weights: Weights, seconds: float) -> None:
        finite = columns["score"][np.isfinite(columns["score"])]
        mean, spread = (float(finite.mean()), float(finite.std())) if len(finite) else (0.0, 0.0)
        share_clipped = float(weights.clipped.mean())
        trained = max(self._training_seconds(), 1e-9)
        scored = int(columns["scored"].sum())
        get_logger().info(
            "refresh %d at step %d: %d rows scored in %.1f s; score %.2f ± %.2f%s; weights %.3g to %.3g, effective "
            "sample size %.0f %%, %.1f %% of rows at max_weight.",
            self.refreshes,
            self.trainer.state.global_step,
            scored,
            seconds,
            mean,
            spread,
            " nats" if self.config.score == "ica" else "",
            weights.values.min(),
            weights.values.max(),
            100 * weights.effective_sample_size,
            100 * share_clipped,
        )
        if self._budgeted is not None:
            self._report_budget(scored, len(columns["row"]))
        if weights.bad.any():
            bad = columns["row"][weights.bad]
            get_logger().warning("%d row(s) have a NaN or infinite score and weight 0: %s", len(bad), bad[:10].tolist())
        self._log(
            {
                "ica/score_mean": mean,
                "ica/score_std": spread,
                "ica/effective_sample_size": weights.effective_sample_size,
                "ica/clipped_share": share_clipped,
                "ica/scoring_seconds": seconds,
                "ica/overhead": self.scoring_seconds / trained if self.refreshes else 0.0,
            }
        )

    def _report_budget(self, scored: int, rows: int) -> None:
        correlation = self._neighbour_correlation
        get_logger().info(
            "ica.budget: %d of %d rows scored; the others have their neighbours' weight (rank correlation on the rows scored so far: %s).",
            scored,
            rows,
            "too few to tell" if correlation is None else f"{correlation:.2f}",
        )
        self._log(
            {"ica/scored_share": scored / rows} | ({} if correlation is None else {"ica/neighbour_correlation": correlation})
        )

    def _report_given(self) -> None:
        values = self.weights.double().numpy()
        weights = Weights(values, np.zeros(len(values), bool), np.zeros(len(values), bool))
        get_logger().info(
            "training with given weights: %d rows, mean %.3g, %.3g to %.3g, effective sample size %.0f %%; nothing is scored.",
            len(values),
            values.mean(),
            values.min(),
            values.max(),
            100 * weights.effective_sample_size,
        )
        self._log({"ica/effective_sample_size": weights.effective_sample_size})

    def _log(self, metrics: dict[str, float]) -> None:
        # transformers' own method: TRL's override would flush its half-collected metrics here.
        Trainer.log(self.trainer, metrics)

    def _write_run(self) -> None:
        if not self.trainer.accelerator.is_main_process:
            return
        self.files.write_run(
            {
                "config": self.config.model_dump(mode="json"),
                "length_normalize": self.length_normalize,
                "rows": len(self.train),
                "holdout_rows": len(self.holdout.examples) if self.holdout else 0,
                "rows_in_holdout": self.holdout.rows_in_train if self.holdout else 0,
                "rows_without_supervised_token": int((self.tokens == 0).sum()),
                "scored_rows": self.scored_rows,
                "scored_share": self.scored_rows / max(self.weighted_rows, 1),
                "neighbour_correlation": self._neighbour_correlation,
                "refreshes": self.refreshes,
                "steps": self.trainer.state.global_step,
                "scoring_seconds": round(self.scoring_seconds, 3),
                "training_seconds": round(self._training_seconds(), 3),
            }
        )
