"""The script that MLflow runs to load the model ("models from code"); not for import."""

from mlflow.models import set_model

from catdog.serving import ServedModel

set_model(ServedModel())
