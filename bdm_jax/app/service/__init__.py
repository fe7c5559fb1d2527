"""The drawing service: one queue, one thread that draws, and what may be picked. Knows no web library.

service = Service(Path("out"), ModelsFolder(Path("models")))
ticket = service.submit(Job((Request("红灯笼", seed=1),), Sampling(steps=15)))
for ticket in ticket.changes():
    print(ticket.state, ticket.done, ticket.total, ticket.pictures)
"""

from bdm_jax.app.service.jobs import Job, QueueFull, Ticket
from bdm_jax.app.service.models import ModelsFolder, stem
from bdm_jax.app.service.service import Service

__all__ = ["Job", "ModelsFolder", "QueueFull", "Service", "Ticket", "stem"]
