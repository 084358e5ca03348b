"""Images and their classes: where they come from, and how they reach a model.

`open_data` finds them, `training_transform` and `evaluation_transform` make tensors of them, and the loaders
batch them. What is not installed everywhere (Pillow, scikit-learn, timm) is imported where it is used.
"""

from .digits import Images, load_digits
from .extras import optional
from .images import IMAGE_ENDINGS, find_images, normalise, open_picture, prepare, read_image, write_image
from .loader import EvaluationLoader, TrainingLoader
from .samples import Batch
from .sources import Source, open_all, open_data
from .transforms import evaluation_transform, training_transform

__all__ = [
    "IMAGE_ENDINGS",
    "Batch",
    "EvaluationLoader",
    "Images",
    "Source",
    "TrainingLoader",
    "evaluation_transform",
    "find_images",
    "load_digits",
    "normalise",
    "open_all",
    "open_data",
    "open_picture",
    "optional",
    "prepare",
    "read_image",
    "training_transform",
    "write_image",
]
