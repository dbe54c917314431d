"""A model as a folder that onnxruntime runs, without PyTorch and without this package.

folder.py              the folder, and what is in it
graphs.py              front end and encoders -> ONNX, traced from the modules that train
smoothing.py           an ONNX file -> the same function, easier to round
int8.py                an ONNX file -> the same with int8 weights
comparison.py          the files against PyTorch
embed.py               the program that goes into the folder
README.template.md     the page that goes into the folder
"""
