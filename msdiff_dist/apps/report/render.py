"""HTML pages with charts: one file each, without references to others.

Jinja escapes all texts; BokehJS, which draws the charts, comes out of the installed bokeh.
"""

from __future__ import annotations

import json
import time
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from msdiff_dist.apps.report.charts import Charts
from msdiff_dist.apps.report.tables import versions


def render(template: str, charts: Charts, *, title: str, refresh_s: float = 0.0, **content: Any) -> str:
    """A page from a template that extends base.html.

    Args:
        refresh_s: seconds after which the page asks its server whether there is more to show; 0: it has no server.
        content: what the template shows.
    """
    here = files(__package__) / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (here / name).read_text()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        title=title,
        refresh_s=refresh_s,
        charts=charts,
        **content,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        versions=versions(),
        data=_script_data(charts.data()),
        style=Markup((here / "report.css").read_text()),
        script=Markup((here / "report.js").read_text()),
        library=_library(),
    )


def _script_data(content: Any) -> Markup:
    """JSON for a script element, which no text in it can end."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _library() -> Markup:
    """BokehJS as a script's text."""
    import bokeh

    scripts = files(bokeh) / "server" / "static" / "js"
    text = "\n".join((scripts / name).read_text("utf-8") for name in ("bokeh.min.js", "bokeh-api.min.js"))
    return Markup(text.replace("</script", "<\\/script"))
