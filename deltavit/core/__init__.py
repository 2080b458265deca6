"""The core: torch and safetensors, nothing else."""
