"""Sphinx reads this; the pages are laid out by `pages.py`"""

from configparser import ConfigParser
from pathlib import Path

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

project    = cfg['lib_name']
author     = cfg['author']
copyright  = cfg['copyright']
release    = cfg['version']
language   = 'en'
extensions = ['myst_nb', 'sphinx_copybutton']

nb_execution_mode    = 'off'  # notebooks are shown with the outputs that they hold
myst_heading_anchors = 4
myst_enable_extensions = ['colon_fence']
suppress_warnings    = ['myst.header']  # definitions stand in any section
nitpicky             = True

add_module_names = False
python_maximum_signature_line_length = 100
copybutton_exclude = '.linenos, .gp, .go'

html_theme = 'pydata_sphinx_theme'
html_title = project
html_theme_options = dict(
    logo=dict(text=project), navbar_align='left', header_links_before_dropdown=6, navigation_with_keys=False,
    show_toc_level=2, secondary_sidebar_items=['page-toc'], footer_start=['copyright'], footer_end=[])
html_logo = html_favicon = 'static/logo.svg'
html_static_path = ['static']
html_css_files   = ['site.css']
html_show_sourcelink = False
html_copy_source = False
