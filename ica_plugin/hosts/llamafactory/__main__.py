"""`python -m ica_plugin.hosts.llamafactory`: the `ica-llamafactory` command, for torchrun and accelerate."""

from .launch import main

main()
