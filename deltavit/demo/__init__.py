"""The embedded demo: a small real Vision Transformer (`vit_pico.safetensors`) and real images, no network needed."""
