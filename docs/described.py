"""Functions and classes in MyST Markdown: signature, documentation and a table of parameters"""

import inspect,re
from typing import NamedTuple

from fastcore.docments import docments

empty = inspect.Parameter.empty
me    = ('self', 'cls')

class Definition(NamedTuple):
    "What a module defines under a name, `fit` or `Class.method`"
    module:object
    name:str

    @property
    def obj(self):
        found = self.module
        for part in self.name.split('.'): found = getattr(found, part)
        return found
    @property
    def owner(self): return getattr(self.module, self.name.split('.')[0])
    @property
    def full_name(self): return f'{self.module.__name__}.{self.name}'
    @property
    def summary(self): return (inspect.getdoc(self.obj) or '').split('\n\n')[0].replace('\n', ' ')

def members(definition):
    "Public methods and properties that a class, or a private class that it extends, documents"
    cls = definition.obj
    if not inspect.isclass(cls): return []
    own = [o for o in cls.__mro__ if o is cls or (o.__name__.startswith('_') and o.__module__.startswith(lib_of(cls)))]
    names = [k for o in reversed(own) for k in vars(o) if not k.startswith('_')]
    found = {k: getattr(cls, k) for k in dict.fromkeys(names)}
    kept = [k for k,v in found.items() if (inspect.isroutine(v) or isinstance(v, property)) and v.__doc__]
    return [definition._replace(name=f'{definition.name}.{k}') for k in kept]

def lib_of(cls): return cls.__module__.split('.')[0]

# --- signature

def shown_type(anno):
    "A type as one would write it: `str|Path`; '' where nothing is said"
    if anno in (empty, None, type(None)): return ''
    if '_SupportsArray' in str(anno): return 'ArrayLike|None' if 'NoneType' in str(anno) else 'ArrayLike'  # of numpy
    plain = isinstance(anno, type) and not getattr(anno, '__args__', None)
    name = anno.__name__ if plain else str(anno)
    return re.sub(r'\b(?:\w+\.)+(?=\w)', '', name).replace(' | ', '|').replace('NoneType', 'None')

class shown_default(NamedTuple):
    "A default that prints as it stands in a signature; what has no short form prints as …"
    value:object

    def __repr__(self):
        if inspect.isroutine(self.value) or inspect.isclass(self.value): return self.value.__name__
        text = repr(self.value)
        return '…' if text.startswith('<') else text

def takes_nothing(f):
    "Is `f` a property, or an exception without arguments of its own?"
    return isinstance(f, property) or (inspect.isclass(f) and issubclass(f, Exception) and '__init__' not in vars(f))

def shown_signature(f):
    "Parameters and defaults in parentheses, without `self` and types"
    if takes_nothing(f): return ''
    params = [p.replace(annotation=empty) for k,p in inspect.signature(f).parameters.items() if k not in me]
    params = [p if p.default is empty else p.replace(default=shown_default(p.default)) for p in params]
    return str(inspect.Signature(params))

# --- parameters

def row(*cells):
    "A row of a Markdown table"
    return '| '+' | '.join(' '.join(str(o).split()).replace('|', r'\|') for o in cells)+' |'

def code(o): return f'`{o}`' if str(o) else ''

def inherited(about, definitions):
    "What the functions that the comment of `**kwargs` names say of their own parameters"
    said = (about.get('kwargs') or {}).get('docment') or ''
    sources = [definitions[o].obj for o in re.findall(r'`(\w+)`', said) if o in definitions]
    return {k: v['docment'] for f in sources for k,v in docments(f, full=True).items()}

def parameters(f, definitions):
    "Name, type, default and meaning of each parameter of `f`, and of what it returns where that is said"
    about = docments(f, full=True, args_kwargs=True)
    above = inherited(about, definitions)
    for k,v in about.items():
        kind,default,meaning = shown_type(v['anno']),v['default'],v['docment'] or above.get(k) or ''
        if k in me or (k=='return' and not kind and not meaning): continue
        name = '*returns*' if k=='return' else code(k)
        yield name,code(kind),'' if default is empty else code(shown_default(default)),meaning

def parameter_table(f, definitions):
    "The parameters of `f` as the lines of a table, without columns that are empty; none where names are all there is"
    rows = [] if takes_nothing(f) else [('Parameter', 'Type', 'Default', 'Meaning'), *parameters(f, definitions)]
    kept = [column for column in zip(*rows) if any(column[1:])]
    if len(kept)<2: return []
    head,*rows = zip(*kept)
    return [row(*head), row(*['---']*len(head)), *(row(*o) for o in rows), '']

# --- the whole

def described(definition, definitions, inner=()):
    "`definition` as an object of Sphinx's Python domain; of a class, its members that have no place of their own too"
    obj,name = definition.obj,definition.name
    kind = 'class' if inspect.isclass(obj) else 'property' if isinstance(obj, property) else \
           'method' if '.' in name else 'function'
    fence = ':::' if name in inner else '::::'
    lines = [f'{fence}{{py:{kind}}} {name}{shown_signature(obj)}', '', inspect.getdoc(obj) or '', '',
             *parameter_table(obj, definitions)]
    for o in members(definition):
        if o.name not in definitions: lines += described(o, definitions, inner=(o.name,))
    return [*lines, fence, '']
