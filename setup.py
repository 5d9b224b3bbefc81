import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ini  = ConfigParser(delimiters=['='])
if not ini.read(root/'settings.ini', encoding='utf-8'): raise FileNotFoundError(f"No settings.ini in {root}")
cfg  = ini['DEFAULT']

licenses = dict(apache2='Apache-2.0', mit='MIT', bsd3='BSD-3-Clause')
statuses = dict(enumerate(['Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Production/Stable', 'Mature', 'Inactive'], 1))
pythons  = ['3.10', '3.11', '3.12', '3.13']
extras   = ['timm', 'medical', 'hf', 'serve', 'dev']
lib      = cfg['lib_name']
url      = cfg['url']
at_tag   = f"v{cfg['version']}"
urls     = dict(Source=url, Changelog=f'{url}/blob/{at_tag}/CHANGELOG.md') if url else {}

def link(m):
    "A link or picture of the README as the package index can show it: absolute, or without `url` its words alone"
    mark,text,path = m.groups()
    if url: return f"{mark}[{text}]({url}/{'raw' if mark else 'blob'}/{at_tag}/{path})"
    return f'*{text}*' if mark else text

def readme():
    "The README, in which links to files of the repository lead there; code stays as it is"
    parts = re.split(r'(^```.*?^```)', (root/'README.md').read_text(encoding='utf-8'), flags=re.M|re.S)
    parts[::2] = [re.sub(r'(!?)\[([^][]*)\]\((?!https?:|#)([^()]+)\)', link, o) for o in parts[::2]]
    return ''.join(parts)

setup(
    name=lib,
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme(),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license_expression=licenses[cfg['license']],
    license_files=['LICENSE'],
    project_urls=urls,
    keywords=cfg['keywords'].split(),
    classifiers=[
        f"Development Status :: {cfg['status']} - {statuses[cfg.getint('status')]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Processing',
        'Topic :: Scientific/Engineering :: Medical Science Apps.',
        *(['Typing :: Typed'] if (root/lib/'py.typed').exists() else []),
        *[f'Programming Language :: Python :: {o}' for o in pythons[pythons.index(cfg['min_python']):]],
    ],
    packages=find_packages(str(root), include=[f'{lib}*']),
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={o: cfg[f'{o}_requirements'].split() for o in extras},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f"{lib}={cfg['lib_path']}._modidx:d"]),
    zip_safe=False,
)
