"What `from fastai_normstats.all import *` brings: the names of the documentation, and the methods that fit, check and plot"
from .values import NormStats
from .moments import NonFiniteError
from .running import Measured, RunningStats
from .loaders import ReadError
from .measure import measure_stats
from .schemes import (ClipZScore, HistogramStandardization, ImageZScore, LocalResponse, MinMax, Scheme, ZScore,
                      schemes)
from .models import IMAGENET, NormalisesInside, known_models, model_stats
from .choice import StatsChoice
from .policy import NotMeasured, Policy, choose_stats
from .cache import clear_cache
from .transform import DatasetStats
from . import block
from .drift import used_stats
from .view import plot_batch, plot_before_after, plot_drift, plot_unusual, report_stats
from .compare import Comparison, compare_stats
from .serve import bake_stats, read_nnunet, verify_stats
from .images import (BandsBlock, FloatImageBlock, PILDicomFloat, PILFloat, TensorBands, TensorVolume, VolumeBlock,
                     Windows, dicom_frames, dicom_pixels, dicom_rgb, dicom_series)

__all__ = ['BandsBlock', 'ClipZScore', 'Comparison', 'DatasetStats', 'FloatImageBlock', 'HistogramStandardization',
           'IMAGENET', 'ImageZScore', 'LocalResponse', 'Measured', 'MinMax', 'NonFiniteError', 'NormStats',
           'NormalisesInside', 'NotMeasured', 'PILDicomFloat', 'PILFloat', 'Policy', 'ReadError', 'RunningStats',
           'Scheme', 'StatsChoice', 'TensorBands', 'TensorVolume', 'VolumeBlock', 'Windows', 'ZScore', 'bake_stats',
           'choose_stats', 'clear_cache', 'compare_stats', 'dicom_frames', 'dicom_pixels', 'dicom_rgb', 'dicom_series',
           'known_models', 'measure_stats', 'model_stats', 'plot_batch', 'plot_before_after', 'plot_drift',
           'plot_unusual', 'read_nnunet', 'report_stats', 'schemes', 'used_stats', 'verify_stats']
