"""What cannot be weighted exactly, told from the trainer."""

from __future__ import annotations

from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import Trainer

from ..data.row_ids import RowIdCollator
from ..errors import ICAError

# Losses whose value for one row depends on the other rows of the batch or on a running mean over batches.
COUPLED_LOSSES = {"aot", "aot_pair", "aot_unpaired", "bco", "bco_pair"}


# What serves where rows cannot be weighted while they are trained: said with each such refusal.
CHOOSE_ROWS = (
    "Or choose rows beforehand: `ica-plugin score` on one GPU with a config without it, `ica-plugin select`, and train what was selected "
    "as you do now, without the plugin."
)

SHARDED = (
    "is not supported yet: its ranks must run the same forwards together, which scoring does not. Take it out of the config; one "
    f"process and DDP work. {CHOOSE_ROWS}"
)


def refuse_what_cannot_be_weighted(trainer: Trainer) -> None:
    if isinstance(trainer.data_collator, RowIdCollator):
        raise ICAError("ica_plugin is attached to this trainer already.")
    dataset = trainer.train_dataset
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "add_column"):
        raise ICAError(
            f"the train dataset is {type(dataset).__name__}: rows of a streaming or iterable dataset have no fixed index to "
            "keep a weight under. Load it as a map-style `datasets.Dataset` (streaming off)."
        )
    if len(dataset) == 0:
        raise ICAError("the train dataset has no rows.")
    _refuse_other_models(trainer)
    coupled = loss_types(trainer) & COUPLED_LOSSES
    if coupled:
        raise ICAError(
            f"the loss `{sorted(coupled)[0]}` couples the rows of a batch, so no single row's gradient can be weighted. "
            f"Use a loss that is a mean over rows: sigmoid, ipo, hinge, simpo, orpo, kto. {CHOOSE_ROWS}"
        )
    kind = trainer.accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ICAError(f"{kind.value} {SHARDED}")
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")) or any(
        isinstance(parameter, DTensor) for parameter in trainer.model.parameters()
    ):
        raise ICAError(f"tensor, context or sequence parallelism {SHARDED}")
    if trainer.args.n_gpu > 1:
        raise ICAError(
            f"one process would train on {trainer.args.n_gpu} GPUs (nn.DataParallel), whose replicas see parts of a batch. Start it with "
            "`torchrun` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )


def _refuse_other_models(trainer: Trainer) -> None:
    if getattr(trainer.model.config, "is_encoder_decoder", False):
        raise ICAError(f"{type(trainer.model).__name__} is an encoder-decoder; ica_plugin weights causal language models.")
    if getattr(trainer.data_collator, "mlm", False):
        raise ICAError("the collator masks tokens (`mlm=True`), and ica_plugin scores causal language models. Set `mlm=False`.")


def loss_types(trainer: Trainer) -> set[str]:
    """Names of the trainer's losses, lower case, as TRL and LLaMA-Factory keep them."""
    names: set[str] = set()
    for holder in (trainer, trainer.args):
        for attribute in ("loss_types", "loss_type"):
            value = getattr(holder, attribute, None)
            names |= {value} if isinstance(value, str) else set(value) if isinstance(value, (list, tuple)) else set()
    class_name = type(trainer).__name__.lower()
    names |= {name for name in ("orpo", "bco") if name in class_name}
    return {str(name).lower() for name in names}
