package sim

import (
	"fmt"
	"testing"
	"time"
)

// A build-index that stood still for longer than its lease, while another took over with an older copy of its database,
// answers nothing when it goes on, ends, and waits then. Proxies that still reach it get no old answer.
func TestPausedBuildIndex(t *testing.T) {
	first, second := NewImage("first", content(1, 3000)), NewImage("second", content(2, 3000))
	for _, pause := range []time.Duration{3 * time.Second, 9 * time.Second, 40 * time.Second} {
		t.Run(pause.String(), func(t *testing.T) {
			directed(t, Options{Twin: true}, func(s *Sim) {
				s.do(Snapshot, s.index)
				s.mustPush("team/a", "v0", first, Push{Hint: true})
				s.twin.copyOf(s.index, true)
				s.do(Start, s.twin)
				s.Wait(3 * time.Second)
				s.do(Freeze, s.index)
				s.Wait(pause)
				s.lead(s.twin, 0)
				if pause > holds {
					s.mustPush("team/a", "v0", second, Push{Hint: true})
					s.must("delete", s.DeleteTag(0, "team/a", "v0", Push{}))
					s.mustPush("team/a", "v1", second, Push{Hint: true})
				}
				s.do(Thaw, s.index)
				for range 8 {
					s.pull(1, "team/a", "v0")
					s.pull(1, "team/a", "v1")
					_ = s.PushImage(1, "team/b", "v0", first, Push{Hint: true, Tries: 1})
					s.Wait(500 * time.Millisecond)
				}
				if at := s.begun(); pause > holds && at != s.twin || pause < holds && at != s.index {
					s.history.violate("sim", "the only build-index is another one")
				}
				s.lead(s.twin, 2)
				s.Settle()
				s.CheckAll("with one that waits")
				s.Restore()
				s.CheckAll("after the restore")
			})
		})
	}
}

// holds is how long a lease holds that is not renewed.
const holds = 6 * time.Second

// A build-index that takes the place of another, killed or ended, knows what that one has acknowledged, whatever its
// own database is: the bucket was down meanwhile.
func TestOtherDatabaseTakesOver(t *testing.T) {
	first, second := NewImage("first", content(1, 3000)), NewImage("second", content(2, 3000))
	for _, how := range []Action{Kill, Vanish, Stop} {
		for _, database := range []string{"empty", "older", "same"} {
			t.Run(string(how)+", "+database, func(t *testing.T) {
				directed(t, Options{Twin: true}, func(s *Sim) {
					s.mustPush("team/a", "v0", first, Push{Hint: true})
					s.mustPush("team/a", "v1", first, Push{Hint: true})
					s.Settle()
					s.do(Snapshot, s.index)
					s.bucket.set(bucketDown)
					s.mustPush("team/a", "v0", second, Push{Hint: true})
					s.must("delete", s.DeleteTag(0, "team/a", "v1", Push{}))
					s.must("mount", s.Mount(0, "team/b", "team/a", second.Blobs[0], Push{}))
					s.do(how, s.index)
					if database != "empty" {
						s.twin.copyOf(s.index, database == "older")
					}
					s.do(Start, s.twin)
					s.lead(s.twin, 1)
					s.Wait(8 * time.Second)
					s.do(Start, s.index)
					s.Wait(4 * time.Second)
					if s.begun() != s.twin {
						s.history.violate("sim", "the second has not taken over")
					}
					s.bucket.set(bucketUp)
					s.lead(s.twin, 0)
					s.Wait(time.Second)
					s.CheckAll("after the other took over")
					s.mustPush("team/a", "v1", second, Push{Hint: true})
					s.do(Stop, s.twin)
					s.lead(s.index, 2)
					s.Wait(3 * time.Second)
					s.CheckAll("after the first went on")
					s.Settle()
					s.CheckAll("after rest")
					s.Restore()
					s.CheckAll("after the restore")
				})
			})
		}
	}
}

// A build-index that stood still while another had taken over does not go on where nobody refuses it, because the other
// stands still by now, and most origins are away.
func TestBothBuildIndexesPaused(t *testing.T) {
	first, second := NewImage("first", content(1, 3000)), NewImage("second", content(2, 3000))
	for _, away := range []int{0, 2} {
		t.Run(fmt.Sprint("without ", away), func(t *testing.T) {
			directed(t, Options{Twin: true}, func(s *Sim) {
				s.mustPush("team/a", "v0", first, Push{Hint: true})
				s.Settle()
				s.bucket.set(bucketDown)
				s.do(Start, s.twin)
				s.do(Freeze, s.index)
				s.Wait(10 * time.Second)
				s.lead(s.twin, 2)
				s.mustPush("team/a", "v0", second, Push{Hint: true})
				s.must("push", s.pushBlob(0, "team/b", second.Blobs[0], Push{Hint: true}))
				s.do(Freeze, s.twin)
				s.Wait(10 * time.Second)
				for i := range away {
					s.Kill(i)
				}
				s.do(Thaw, s.index)
				s.lead(s.index, 2)
				for range 10 {
					s.pull(0, "team/a", "v0")
					s.pull(1, "team/b", "v0")
					s.Wait(500 * time.Millisecond)
				}
				s.Settle()
				s.CheckAll("after the first went on")
				s.Restore()
				s.CheckAll("after the restore")
			})
		})
	}
}
