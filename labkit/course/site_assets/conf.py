"""Sphinx's settings for the site. `labkit.course.site` copies this file beside the pages that it writes."""

project = "One-GPU Lab"
html_title = "One-GPU Lab"
language = "en"
extensions = ["myst_nb", "sphinx.ext.mathjax"]

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the side bar has the search already
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "extra_footer": "Code: MIT. Text and figures: CC BY 4.0.",
}
html_context = {"default_mode": "auto"}
html_static_path = ["static"]
html_extra_path = ["extra"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]  # and each of the two others on its own page, see setup
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_use_index = False
html_show_search_summary = False  # Sphinx's own summaries are fetched, which a file:// page may not do; see search.js

# MathJax 3 in one file: SVG needs no fonts. Its menu would load more files, and make each formula a stop of Tab.
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "local"}}


def setup(app):
    """The scripts that one page alone needs."""
    def add(app, page, *_):
        for wanted, script in {"ledger": "ledger.js", "search": "search.js"}.items():
            if page == wanted:
                app.add_js_file(script)

    app.connect("html-page-context", add)
