"""Looking at what a detector finds in images and videos."""

from .detect import Detections, choose_device, detect, preprocessing
from .frames import MOVING, Frame, ImageFile, find_files, read_frames, take_image_ids
from .pictures import COLOURS, draw_boxes, save_picture
from .results import IMAGES, PREDICTIONS, open_results

__all__ = [
    "COLOURS",
    "IMAGES",
    "MOVING",
    "PREDICTIONS",
    "Detections",
    "Frame",
    "ImageFile",
    "choose_device",
    "detect",
    "draw_boxes",
    "find_files",
    "open_results",
    "preprocessing",
    "read_frames",
    "save_picture",
    "take_image_ids",
]
