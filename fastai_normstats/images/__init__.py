"DICOM, 16-bit and float files, and windows; images of many bands, and volumes"
from .files import *
from .volumes import *
