"""MM Grounding DINO (Zhao et al., arXiv 2401.02361): Grounding DINO with a learnt bias of its class scores."""

from __future__ import annotations

from .grounding_dino import GroundingDinoAdapter


class MMGroundingDinoAdapter(GroundingDinoAdapter):
    """Adapter of `MMGroundingDinoForObjectDetection`."""
