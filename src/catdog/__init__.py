"""catdog: reproducible transfer learning for image classification on DVC, MLflow and Keras 3."""

__version__ = "0.1.0"
