"""Community files in, community files out: safetensors to flat JAX trees and back.

A ground floor: nothing here imports `bdm_jax`, JAX or PyTorch; arrays are NumPy's.
"""
