"""What of a backbone is not trained."""

from __future__ import annotations

import logging
import re

from .detectors.base import DetectorAdapter
from .errors import UserError

logger = logging.getLogger(__name__)

# timm: layer1.0.conv1, s1.b1, stages_0.blocks, layers_0.blocks; Transformers: encoder.stages.0.layers.0,
# encoder.layers.0.blocks, hidden_states_norms.stage2. The first of these in a name is the stage.
_STAGE = re.compile(r"(?:^|\.)(?:(?:layer|stage|s)(?P<from_1>\d+)|(?:stages|layers)[._](?P<from_0>\d+))(?:\.|$)")


def freeze_backbone(adapter: DetectorAdapter, frozen_stages: int) -> list[str]:
    """Freezes the stem and the first `frozen_stages` stages of the backbone, and nothing else; -1 freezes nothing.

    Transformers' own freezing is undone: it depends on module names that not all backbones have.

    Returns:
        Names of the frozen parameters within the backbone. They are counted in the log.

    Raises:
        UserError: stages are to be frozen and the backbone names none.
    """
    parameters = dict(adapter.backbone.named_parameters())
    if frozen_stages > 0 and max(map(backbone_stage, parameters)) == 0:
        raise UserError(
            f"cannot tell the stages of {type(adapter.backbone).__name__}: set model.student.frozen_stages to -1 or 0"
        )
    frozen = [name for name in parameters if backbone_stage(name) <= frozen_stages]
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    logger.info("%d of %d backbone tensors frozen (frozen_stages %d)", len(frozen), len(parameters), frozen_stages)
    return frozen


def backbone_stage(name: str) -> int:
    """Stage of a module or parameter by its name within the backbone: 0 is the stem, 1 the first stage."""
    match = _STAGE.search(name)
    if match is None:
        return 0
    return int(match["from_1"]) if match["from_1"] else int(match["from_0"]) + 1
