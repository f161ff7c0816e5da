from .configuration_adamixer import AdaMixerConfig
from .image_processing_adamixer import AdaMixerImageProcessor
from .modeling_adamixer import AdaMixerForObjectDetection, AdaMixerModel, AdaMixerPreTrainedModel

__all__ = [
    "AdaMixerConfig",
    "AdaMixerForObjectDetection",
    "AdaMixerImageProcessor",
    "AdaMixerModel",
    "AdaMixerPreTrainedModel",
]
