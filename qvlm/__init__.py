"""qvlm: quantization of vision-language models (the core; torch lives here and nowhere else).

recipe      what to quantize and how (no torch)
checkpoint  the quantized model on disk (no torch)
affine      scale, zero point, rounding, packing
methods     one file per method; ``METHODS`` maps a recipe's name to it
models      one file per architecture; ``ADAPTERS`` maps ``model_type`` to it
capture     the inputs of each layer on the calibration samples
quantize    the driver: model + recipe + samples -> checkpoint
evaluate    exact match and divergence from the float model
"""

__version__ = "0.1.0"
