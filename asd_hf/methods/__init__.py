"""One file a paper. The name of a method is its file's name and the value of `method.name` in a configuration."""

from ..registry import resolve
from .base import DistillationMethod, MethodConfig
from .combined import CombinedMethod

METHODS = {
    "asd": "asd_hf.methods.asd:ASD",
    "balanced_pairs": "asd_hf.methods.balanced_pairs:BalancedPairs",
    "clockdistill": "asd_hf.methods.clockdistill:CLoCKDistill",
    "d3etr": "asd_hf.methods.d3etr:D3ETR",
    "detrdistill": "asd_hf.methods.detrdistill:DETRDistill",
    "fgd": "asd_hf.methods.fgd:FGD",
    "fitnet": "asd_hf.methods.fitnet:FitNet",
    "index_pairing": "asd_hf.methods.index_pairing:IndexPairing",
    "kd_detr": "asd_hf.methods.kd_detr:KDDETR",
    "ld": "asd_hf.methods.ld:LD",
    "mgd": "asd_hf.methods.mgd:MGD",
    "od_detr": "asd_hf.methods.od_detr:ODDETR",
    "pseudo_labels": "asd_hf.methods.pseudo_labels:PseudoLabels",
    "qskd": "asd_hf.methods.qskd:QSKD",
}


def get_method(name: str) -> type[DistillationMethod]:
    """The class of method `name`: a key of `METHODS`, or "module:Class" for one of your own."""
    return resolve(name, METHODS, "method")


__all__ = ["METHODS", "CombinedMethod", "DistillationMethod", "MethodConfig", "get_method"]
