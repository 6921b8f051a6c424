"""Faster layers that replace those of model.py once a model is on its device."""

from collections.abc import Callable

import torch.nn as nn


def replace_layers(model: nn.Module, replacements: dict[type, Callable[[nn.Module], nn.Module]]) -> nn.Module:
    """Replace, only in this model, each layer whose class is a key by the result of the key's function."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in replacements:
                setattr(parent, name, replacements[type(child)](child).train(child.training))
    return model
