"""The local page of `python -m vlab_jax.predict serve`: what it asks for, what it plays, and the page itself.

`service` answers, `playable` makes files playable in a browser, `app` is HTTP. `page.html`, `page.css` and `page.js`
are written by hand and ask nothing of the network but this server.
"""
