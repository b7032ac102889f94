"""Measured latency: small ONNX models of what may take a layer's place, timed in ONNX Runtime, and what they add up to.

``runner`` needs only NumPy and ONNX Runtime and runs on devices by itself; the other files need no runtime.
"""
