"""qvlm-serve: one model folder behind an OpenAI-compatible HTTP interface, for one machine.

cli starts uvicorn with an App. App (app.py) is plain ASGI: it checks who asks (access), how much
(limits, gate), what (protocol, images), runs the answer and counts it (metrics). page.html with its
script and style is a small page to try a model by hand.

Importing this package loads neither uvicorn nor the model.
"""
