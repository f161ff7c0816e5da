"""Models that Transformers does not have, laid out as it lays out its own. Importing them makes them known to the Auto
classes; `import asd_hf` does."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from .adamixer import AdaMixerConfig, AdaMixerForObjectDetection, AdaMixerImageProcessor, AdaMixerModel
from .adamixer.loss_adamixer import adamixer_loss

AutoConfig.register(AdaMixerConfig.model_type, AdaMixerConfig)
AutoModel.register(AdaMixerConfig, AdaMixerModel)
AutoModelForObjectDetection.register(AdaMixerConfig, AdaMixerForObjectDetection)
# What `pipeline` looks at: it would say that the model is not supported, and run it.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[AdaMixerConfig.model_type] = AdaMixerForObjectDetection.__name__
LOSS_MAPPING[AdaMixerForObjectDetection.__name__] = adamixer_loss
AutoImageProcessor.register(AdaMixerConfig, image_processor_classes={"torchvision": AdaMixerImageProcessor})

__all__ = ["AdaMixerConfig", "AdaMixerForObjectDetection", "AdaMixerImageProcessor", "AdaMixerModel"]
