// Package chaos runs a cluster of real processes under load while faults happen to it, one after the other: processes
// are killed, ended, stopped and continued, networks are cut, disks are filled, folders are wiped. A model remembers
// every answer that clients were given, and at the end, and once more after everything but the bucket was lost, nothing
// that was acknowledged may be missing, nothing wrong be served, and nothing deleted be back.
//
// A table says for each kind of fault how many requests failed at their first try, how long the slowest that succeeded
// took, and how long the component took from its start to being ready.
//
//	make chaos                          200 faults, about half an hour
//	make chaos FAULTS=20 KINDS=hang     20 faults, all of one kind
//	make chaos SEED=7                   the faults of one seed again; timing and load differ
//
// As root it runs in network and mount namespaces of its own, with each component's state on a small file system of its
// own. Without root, cut networks and full disks are left out.
package chaos
