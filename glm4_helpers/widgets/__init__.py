"""Widgets of the notebooks: the chat box, the token view and the live plot of a training run.

Each also has a form for readers without a running kernel: Markdown, HTML or a matplotlib figure.
"""

from .chat import ChatBox, chat_box
from .live import LivePlot, live_plot
from .tokens import TokenBox, token_boxes, token_view, token_view_figure, token_view_html

__all__ = [
    "ChatBox", "LivePlot", "TokenBox", "chat_box", "live_plot", "token_boxes", "token_view", "token_view_figure",
    "token_view_html",
]  # fmt: skip
