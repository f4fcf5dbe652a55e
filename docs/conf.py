"Sphinx settings of the site; `tools/build_docs.py` makes the sources and calls Sphinx."
import importlib.util
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
settings = ConfigParser(interpolation=None)
settings.read(HERE.parent/'settings.ini')
settings = settings['DEFAULT']

project, author, copyright = settings['title'], settings['author'], settings['copyright']
version = release = settings['version']
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx_design']

nb_execution_mode, nb_merge_streams = 'off', True    # show what the notebooks store, run nothing
nb_code_prompt_show, nb_code_prompt_hide = 'Show the {type}', 'Hide the {type}'
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_block', 'deflist']
myst_heading_anchors = 4                             # [x](core.ipynb#payoff) resolves; a wrong one warns
myst_dmath_double_inline = True
highlight_language = 'text'                           # of fences that name none
suppress_warnings = ['myst.header']                  # API entries are H3 wherever they stand

# one local file with its fonts inside: mathematics without a network
mathjax = Path(importlib.util.find_spec('sphinx-mathjax-offline').origin).parent/'static/mathjax/tex-svg.js'
mathjax_path = mathjax.name

pygments_style, pygments_dark_style = 'a11y-light', 'github-dark'
html_theme, html_title, html_short_title = 'furo', project, project
html_static_path, html_css_files = [str(HERE/'_static'), str(mathjax)], ['custom.css']
html_extra_path = [str(HERE/'assets')]               # pages of their own, at the root of the site
html_show_sourcelink = html_copy_source = False
html_theme_options = dict(
    navigation_with_keys=True,
    light_css_variables={'color-brand-primary': '#3b528b', 'color-brand-content': '#2a6f97'},
    dark_css_variables={'color-brand-primary': '#8fb3e8', 'color-brand-content': '#7fc8d8'},
    footer_icons=[dict(name='Source', url=settings['git_url'], html='source', **{'class': ''})],
)
copybutton_exclude = '.linenos, .gp, .go'
