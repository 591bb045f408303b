"""The notebooks' widgets: the chat box and the token view. Door: the notebooks.

Each also has a form for readers without a running kernel: Markdown, HTML or a matplotlib figure.
"""

from .chat import ChatBox, chat_box
from .tokens import TokenBox, token_boxes, token_view, token_view_figure, token_view_html

__all__ = ["ChatBox", "TokenBox", "chat_box", "token_boxes", "token_view", "token_view_figure", "token_view_html"]
