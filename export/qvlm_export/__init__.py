"""qvlm_export: a quantized checkpoint becomes plain ONNX graphs, engines and a verified folder.

No torch. From the bottom up:

targets    what each consumer of a graph has
weights    lazy constants and external data; graph: nodes, names and constants of one ONNX graph
ops, attention, qdq   the lowering vocabulary; only qdq creates QuantizeLinear, DequantizeLinear
models     one builder per architecture; ``BUILDERS`` maps ``model_type`` to it
build      checkpoint and target -> graphs; facts: what a written graph holds
verify     replay of the goldens through ONNX Runtime; bounds: the tolerances and their reasons
rtx        ahead-of-time compilation with TensorRT for RTX
package    the model folder that qvlm_runtime opens
pipeline   the stages of ``qvlm-export SRC OUT`` in order
report     report.json and report.html
"""
