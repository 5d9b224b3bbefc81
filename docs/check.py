"""Checks a site that was built: every link inside it leads somewhere, every picture is there, nothing is fetched from
elsewhere, and the search knows words that people look for:

    python docs/check.py FOLDER"""

import json,re,sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

words  = 'groups HU export patient DICOM Dice ONNX nodata'.split()
loaded = dict(img='src', script='src', link='href', source='srcset', iframe='src')

class Page(HTMLParser):
    "Anchors, links and what a page loads"
    def __init__(self, text):
        super().__init__()
        self.anchors,self.links,self.loads = set(),[],[]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        if tag=='a' and attrs.get('href'): self.links.append(attrs['href'])
        url = attrs.get(loaded.get(tag, ''))
        if url and not url.startswith('data:'): self.loads.append(url)

def target_of(url, file):
    "File and anchor that `url` in `file` means; (None, '') where it leads out of the site"
    parts = urlsplit(url)
    if parts.scheme or parts.netloc: return None,''
    there = (file.parent/unquote(parts.path)).resolve() if parts.path else file
    return (there/'index.html' if there.is_dir() else there),unquote(parts.fragment)

def html_of(site):
    "The pages of a site, without templates that a theme leaves beside its style sheets"
    return [f for f in sorted(site.rglob('*.html')) if '_static' not in f.relative_to(site).parts]

def broken(site):
    "A sentence for every link that leads nowhere and everything that is fetched from elsewhere"
    pages = {f: Page(f.read_text('utf-8')) for f in html_of(site)}
    for f,page in pages.items():
        here = f.relative_to(site)
        for url in [*page.links, *page.loads]:
            there,anchor = target_of(url, f)
            if there is None:
                if url in page.loads: yield f'{here} loads {url} from elsewhere'
            elif not there.exists(): yield f'{here}: {url} is not there'
            elif anchor and there in pages and anchor not in pages[there].anchors:
                yield f'{here}: {url} has no such anchor'

def unfound(site):
    "A sentence for every word that the search does not know"
    from sphinx.search.en import SearchEnglish
    index = json.loads(re.search(r'\{.*\}', (site/'searchindex.js').read_text('utf-8'), re.S)[0])
    known = {*index['terms'], *index['titleterms']}
    for w in words:
        if SearchEnglish({}).stem(w.lower()) not in known: yield f'the search finds nothing for {w!r}'

def main(site):
    if not (site/'index.html').exists(): sys.exit(f'{site} holds no site: it has no index.html')
    wrong = [*broken(site), *unfound(site)]
    if wrong: sys.exit('\n'.join(wrong))
    print(f"{len(html_of(site))} pages, all links and pictures are there. Open {site/'index.html'}")

if __name__=='__main__': main(Path(sys.argv[1]).resolve())
