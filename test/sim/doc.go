// Package sim runs the protocol of a cluster in one process and in virtual time: proxies, origins and a build-index as
// they are, on a network, a bucket and disks that break as a seed decides. A model of all answers that clients had
// says what must hold. README.md says how to run it, how to read a failure, and how to add a fault.
package sim
