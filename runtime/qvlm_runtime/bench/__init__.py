"""qvlm-bench: what a model folder costs on this machine, in time, memory and energy.

plan says what to measure; measure runs it round by round over its subjects (folders, each in a
worker process); figure turns samples into a median with an interval; floors and weights say what
the hardware allows; power and machine read the board; result is bench.json, page is bench.html.
NumPy and the runtime's own dependencies, nothing more.
"""
