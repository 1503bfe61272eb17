"""afina fine-tunes a pretrained Hugging Face model on labelled text as a Slurm batch job that survives the cluster."""

__version__ = "0.1.0"
