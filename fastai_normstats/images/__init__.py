"DICOM, 16-bit and float files, and windows"
from .files import *
