"""The page in the browser: prompt, picture, gallery; everything else is folded away. Built with Gradio.

It draws through `app.service`, as the server's other clients do, and opens no address but its own.
`mount.mount` puts it into a server.
"""
