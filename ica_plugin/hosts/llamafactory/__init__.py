"""LLaMA-Factory: `ica-llamafactory` in place of `llamafactory-cli`, and the holdout through its own loader and template.

LLaMA-Factory 0.9 has no plugin registry and never hands its trainer to a callback. So, only while its `run_exp` runs,
`transformers.Trainer.train` first attaches to the trainer (`launch.attaching`); and only while its launcher runs, that launcher
starts `launch` in place of itself. Nothing of the host is copied, subclassed or reloaded.
"""
