"""Files that deploy a fleet: compose for one machine, systemd and Ansible for many, and what watches over it."""
