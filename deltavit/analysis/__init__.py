"""Why a method works, and where: local intrinsic dimension, fine-tuned angles, spectra, soups.

Each is a module of its own: pure functions on weights, or a generator over training runs, with its pictures.
"""
