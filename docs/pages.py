"""Lays out the pages of the site for Sphinx, each from the one place where it is written:

    python docs/pages.py FOLDER

The README is the start. Notebooks are the guides and, with what they export described, the pages of the modules. The
FAQ, CONTRIBUTING, CHANGELOG and the benchmarks are taken as they are. Links between files become links between pages,
names of functions and classes become links to where they are described."""

import json,re,shutil,sys,warnings
from importlib import import_module
from pathlib import Path

warnings.filterwarnings('ignore')  # of what fastai imports
from fastcore.nbio import mk_cell, nb2dict, read_nb
from nbdev.process import NBProcessor
from nbdev.processors import add_show_docs, clean_magics, filter_stream_, hide_, hide_line, rm_export, strip_ansi
from nbdev.showdoc import show_doc

from described import Definition, described, members, row

root  = Path(__file__).resolve().parent.parent
lib   = 'fastai_normstats'
proof = ['63_evidence', '65_evidence_xrays']
first = ['60_tour', '66_which']  # of the guides; the others follow by number
pictures = ('.png', '.svg')
wings = dict(view='Pictures', compare='Comparing by training', serve='Serving', images='Images', cli='Command line')
texts = {root/'README.md': 'index', root/'docs/faq.md': 'faq', root/'CONTRIBUTING.md': 'contributing',
         root/'CHANGELOG.md': 'changelog', root/'benchmarks/results.md': 'evidence/benchmarks'}

# --- what pages there are

def module_of(nb):
    "The module that a notebook exports to, without the library's name; '' for one that only tells"
    found = (re.match(r'#\| ?default_exp (\S+)', c.source) for c in nb.cells)
    return next((m[1] for m in found if m), '')

def page_of(file, module):
    "The page of a notebook, as a path"
    if module: return f'api/{module}.ipynb'
    return f"{'evidence' if file.stem in proof else 'guides'}/{file.stem.split('_', 1)[1]}.ipynb"

notebooks = {f: read_nb(f) for f in sorted((root/'nbs').glob('*.ipynb'))}
modules   = {f: module_of(nb) for f,nb in notebooks.items()}
pages     = {**{f: page_of(f, m) for f,m in modules.items()}, **{f: f'{p}.md' for f,p in texts.items()}}

def opening(file):
    "Title and subtitle of a notebook, or of a Markdown file"
    nb = notebooks.get(file)
    text = next(c.source for c in nb.cells if c.cell_type=='markdown') if nb else file.read_text('utf-8')
    title,*rest = text.split('\n')
    return title.lstrip('# '),' '.join(o.lstrip('> ') for o in rest if o.startswith('>'))

# --- links

def relinked(text, file):
    "Links in the Markdown of `file` to other files of this project, as links to their pages"
    def page(m):
        target,_,anchor = m[2].partition('#')
        if not target or '://' in target: return m[0]
        there = (file.parent/target).resolve()
        if there in pages: return f"{m[1]}(/{pages[there]}{'#'+anchor if anchor else ''})"
        if there.suffix in pictures and there.exists(): return f'{m[1]}(/pictures/{there.name})'
        raise ValueError(f"{file.relative_to(root)} links to {m[2]}, which is no page of the site")
    return re.sub(r'(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)', page, text)

def with_names(text, known):
    "Names in backticks as links to what describes them; headings, code, links and directives stay as they are"
    def role(m): return f'{{py:obj}}`{m[1]} <{known[m[1]]}>`' if m[1] in known else m[0]
    lines,fence = [],None
    for line in text.split('\n'):
        edge = re.match(r'\s*(```+|~~~+)', line)
        if edge: fence = None if fence==edge[1] else fence or edge[1]
        elif not fence and not re.match(r'#|:::', line):
            line = re.sub(r'(?<![`\[}\w])`([A-Za-z_][\w.]*)(?:\(\))?`(?![`\]])', role, line)
        lines.append(line)
    return '\n'.join(lines)

def with_math(text):
    "TeX between dollars as MathML, which browsers draw by themselves; code stays as it is"
    def drawn(m):
        from latex2mathml.converter import convert
        return m[0] if m[1] else convert(m[2] or m[3], display='block' if m[2] else 'inline')
    return re.sub(r'(`+.+?`+)|\$\$(.+?)\$\$|\$(?=\S)([^$\n]+?)\$', drawn, text, flags=re.S)

def known_names(definitions):
    "{a name as prose has it: the full name}; methods that fastai's classes are given also go by their own name"
    given = [d for d in reversed(definitions.values()) if '.' in d.name and not d.owner.__module__.startswith(lib)]
    return {**{d.name.split('.')[1]: d.full_name for d in given},
            **{o.name: o.full_name for d in definitions.values() for o in members(d)},
            **{d.name: d.full_name for d in definitions.values()}}

# --- notebooks

def asked(cell):
    "The name in a cell `show_doc(name)`"
    m = re.match(r'show_doc\(([\w.]+)\)$', cell.source) if cell.cell_type=='code' else None
    return m and m[1]

def opened(nb):
    "`nb` without what is hidden or empty; for each definition that it exports nbdev adds a cell that asks for it"
    procs = [add_show_docs, strip_ansi, hide_line, filter_stream_, rm_export, clean_magics, hide_]
    NBProcessor(nb=nb, procs=procs).process()
    nb.cells = [c for c in nb.cells if not re.search(r'(^|\.)_', asked(c) or '')]
    for c in nb.cells: c.outputs = [o for o in c.get('outputs', []) if not is_empty(o)]

def is_empty(output):
    "Is it the HTML of a progress bar that is gone?"
    html = output.get('data', {}).get('text/html')
    return html is not None and not re.sub(r'<style.*?</style>|<!--.*?-->|<[^>]+>|\s', '', ''.join(html), flags=re.S)

def is_table(output):
    "Is printed text set in columns, which wrapping would tear?"
    text = output.get('text') or output.get('data', {}).get('text/plain', '')
    return re.search(r'\S {2,}\S', ''.join(text)) is not None

def tags_of(cell):
    "What MyST-NB and the style sheet should know of a code cell"
    prose = [] if any(map(is_table, cell.outputs)) else ['prose']
    return prose+(['remove-input'] if cell.directives_.get('echo')=='false' else [])

def contents(definitions):
    "A module, and a table of what it defines"
    name = definitions[0].module.__name__
    return mk_cell(f':::{{py:module}} {name}\n:::\n\nModule `{name}`\n\n{table(definitions)}', 'markdown')

def table(definitions):
    "Names and what they are"
    rows = [row(f'`{o.name}`', o.summary) for o in definitions]
    return '\n'.join([row('Name', 'What it is'), row('---', '---'), *rows])

def filled(nb, own, definitions):
    "The cells of `nb` with its `own` definitions described where they stand, and listed below the title"
    def written_out(sym, name, title_level): return '\n'.join(described(own[name], definitions))
    def answered(name): return mk_cell(show_doc(own[name].obj, renderer=written_out, name=name), 'markdown')
    cells = [answered(asked(c)) if asked(c) else c for c in nb.cells]
    at = next(i for i,c in enumerate(cells) if c.cell_type=='markdown')+1
    return [*cells[:at], contents([*own.values()]), *cells[at:]]

# --- pages that list others

def toctree(entries, caption=''):
    caption = [f':caption: {caption}'] if caption else []
    return '\n'.join(['```{toctree}', ':hidden:', *caption, '', *(f'/{o}' for o in entries), '```', ''])

def listed(files):
    "Titles, which are links, and subtitles"
    lines = []
    for f in files:
        title,subtitle = opening(f)
        lines.append(f'- [{title}](/{pages[f]}): {subtitle}')
    return '\n'.join(lines)

def section(title, lead, groups):
    "A page that lists the pages of `groups`, {heading: files}"
    parts = [f'# {title}', lead]
    for heading,files in groups.items(): parts += [*([f'## {heading}'] if heading else []), listed(files)]
    return '\n\n'.join([*parts, *(toctree([pages[f] for f in files], o) for o,files in groups.items())])

def guides():
    told = [f for f,m in modules.items() if not m and f.stem not in proof]
    told.sort(key=lambda f: (first.index(f.stem) if f.stem in first else len(first), f.stem))
    return section('Guides', 'From files to a trained learner. Each page is a notebook that can be run.', {'': told})

def evidence():
    files = [*(root/'nbs'/f'{o}.ipynb' for o in proof), root/'benchmarks/results.md']
    return section('Evidence', 'What was measured, with the data and the code to measure it again.', {'': files})

def api(definitions):
    "What `all` brings by name, then the modules by wing"
    brought = import_module(f'{lib}.all')
    named   = [d for d in definitions if d.name in brought.__all__ and d.obj is getattr(brought, d.name)]
    patched = [d for d in definitions if '.' in d.name]
    lead = [f'`from {lib}.all import *` brings:', table(sorted(named, key=lambda d: d.name.lower())),
            "It also gives fastai's classes, and its own, these methods:", table(patched),
            'The modules, in the order in which they import one another:']
    groups = {'Core': []}
    for f,m in modules.items():
        if m: groups.setdefault(wings.get(m.split('.')[0], 'Core'), []).append(f)
    return section('API', '\n\n'.join(lead), groups)

# --- all of it

def defined(file, nb):
    "{name: definition} of what the notebook of a module exports"
    module = import_module(f'{lib}.{modules[file]}')
    return {o: Definition(module, o) for o in map(asked, nb.cells) if o}

def lay_out(out):
    "Write all pages into folder `out`, in place of pages that it holds"
    if out.exists() and any(out.iterdir()) and not (out/'api'/'index.md').exists():
        sys.exit(f"{out} holds something else than pages of the site: give an empty folder")
    shutil.rmtree(out, ignore_errors=True)
    for nb in notebooks.values(): opened(nb)
    by_room = {f: defined(f, nb) for f,nb in notebooks.items() if modules[f]}
    every = [d for room in by_room.values() for d in room.values()]
    definitions = {d.name: d for d in every}
    known = known_names(definitions)
    def linked(text, f): return with_names(relinked(text, f), {**known, **known_names(by_room.get(f, {}))})
    for f,nb in notebooks.items():
        if modules[f]: nb.cells = filled(nb, by_room[f], definitions)
        for c in nb.cells:
            if c.cell_type=='markdown': c.source = linked(with_math(c.source), f)
            else: c.metadata.tags = tags_of(c)
        written(out/pages[f]).write_text(json.dumps(nb2dict(nb)), 'utf-8')
    for f in texts: written(out/pages[f]).write_text(linked(f.read_text('utf-8'), f), 'utf-8')
    for page,text in dict(guides=guides(), api=api(every), evidence=evidence()).items():
        written(out/page/'index.md').write_text(with_names(text, known), 'utf-8')
    with (out/'index.md').open('a', encoding='utf-8') as start:
        start.write('\n'+toctree(['guides/index', 'api/index', 'evidence/index', 'faq', 'changelog', 'contributing']))
    for f in (root/'docs').iterdir():
        if f.suffix in pictures: shutil.copy(f, written(out/'pictures'/f.name))

def written(file):
    "`file`, in a folder that is there"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file

if __name__=='__main__': lay_out(Path(sys.argv[1]))
