"""Single-device mixture of experts: router -> dispatch -> expert backend -> combine. Knows no process group.

Reading order: layer.py, routing.py, routers/, dispatch.py, experts.py, backends/. Shape letters: B images, L tokens an image,
T = B*L tokens, D width, F expert hidden width, E experts, K experts a token, R = T*K routed rows.
"""
