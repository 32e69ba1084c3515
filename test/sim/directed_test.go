package sim

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// directed runs a schedule by hand on a fresh cluster, and fails with what it violates.
func directed(t *testing.T, o Options, f func(s *Sim)) {
	t.Helper()
	if o.Seed == 0 {
		o.Seed = 1
	}
	o.Dir, o.Log = memoryDir(t), level()
	now := time.Now()
	var w watch
	defer w.begin(t.Name())()
	synctest.Test(t, func(t *testing.T) {
		defer w.tick(now)()
		time.Sleep(time.Until(now))
		s, err := New(o)
		if err != nil {
			t.Fatal(err)
		}
		s.Up()
		f(s)
		s.Close()
		for _, v := range s.history.violations() {
			t.Error(v)
		}
		if t.Failed() || testing.Verbose() {
			t.Logf("history:\n%s", s.history)
		}
	})
}

// placed finds content whose owners, best first, and further origins are those of the numbers given.
func (s *Sim) placed(size int, order ...int) []byte {
	for k := 0; ; k++ {
		b := content(k, size)
		if slices.Equal(s.order(b)[:len(order)], order) {
			return b
		}
	}
}

// mustPush pushes, and takes a refusal for a violation.
func (s *Sim) mustPush(repo, tag string, i *Image, p Push) {
	if err := s.PushImage(0, repo, tag, i, p); err != nil {
		s.history.violate("refused", "push of %s to %s:%s: %v", i.Name, repo, tag, err)
	}
}

func (s *Sim) must(what string, err error) {
	if err != nil {
		s.history.violate("refused", "%s: %v", what, err)
	}
}

func layer(repo string, b []byte) name { return name{"layer", repo, digest.FromBytes(b).String()} }

// A copy that owes nothing does not count as one that does: the third origin keeps its debt until both owners owe.
func TestCopyWithoutDebt(t *testing.T) {
	directed(t, Options{}, func(s *Sim) {
		b := s.placed(5000, 0, 1, 2)
		s.bucket.set(bucketDown)
		s.Kill(0)
		s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true})) // to origins 2 and 3
		s.Start(0)
		s.must("read", s.Read(0, layer("team/a", b), 5)) // origin 1 copies it
		s.Wait(time.Minute)
		s.Wipe(1)
		s.Start(1)
		s.Wait(time.Minute)
		s.Settle()
		s.CheckAll("after one disk was lost")
		s.Restore()
		s.CheckAll("after the restore")
	})
}

// By ordinary operation: origins restarted in turn under load while the bucket is away, then one disk lost.
func TestRollingRestartWithoutBucket(t *testing.T) {
	directed(t, Options{}, func(s *Sim) {
		s.bucket.set(bucketDown)
		for i := range 3 {
			s.Kill(i)
			for k := range 6 {
				b := content(100*i+k, 3000)
				s.must("push", s.pushBlob(k%2, "team/a", b, Push{Hint: k%3 > 0}))
				s.must("read", s.Read(0, layer("team/a", b), 5))
			}
			s.Start(i)
			for k := range 6 {
				s.must("read", s.Read(0, layer("team/a", content(100*i+k, 3000)), 5))
			}
			s.Wait(20 * time.Second)
		}
		s.Wait(time.Minute)
		s.Wipe(1)
		s.Start(1)
		s.Settle()
		s.Restore()
		s.CheckAll("after the restore")
	})
}

// A bit that flips before write-back does not come into the bucket.
func TestFlipBeforeWriteBack(t *testing.T) {
	for owner := range 2 {
		t.Run(fmt.Sprint("owner ", owner+1), func(t *testing.T) {
			directed(t, Options{}, func(s *Sim) {
				b := s.placed(5000, 0, 1)
				s.bucket.set(bucketDown)
				s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
				s.Flip(owner, b)
				s.bucket.set(bucketUp)
				s.Settle()
				s.Restore()
				s.CheckAll("after the restore")
			})
		})
	}
}

// A wrong object in the bucket is replaced by the next push of the same digest.
func TestWrongObjectInBucket(t *testing.T) {
	directed(t, Options{Unchecked: true}, func(s *Sim) {
		b := s.placed(5000, 0, 1)
		s.bucket.put(b, append([]byte("x"), b[1:]...))
		s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
		s.Settle()
		if !s.inBucket(digest.FromBytes(b)) {
			s.history.violate("wrong", "the bucket still has other bytes")
		}
		s.Restore()
		s.CheckAll("after the restore")
	})
}

// A rotten copy is met once: the next reads are right within seconds.
func TestRottenCopy(t *testing.T) {
	for _, size := range []int{700, 40_000, 400_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			directed(t, Options{}, func(s *Sim) {
				b := s.placed(size, 0, 1)
				s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
				s.Settle()
				s.Flip(0, b)
				_ = s.Read(0, layer("team/a", b), 1) // it may be wrong once
				s.Wait(10 * time.Second)
				for range 3 {
					s.must("read", s.Read(0, layer("team/a", b), 1))
				}
			})
		})
	}
}

// To push a blob again whose copy is rotten puts verified bytes in its place.
func TestPushOverRottenCopy(t *testing.T) {
	directed(t, Options{}, func(s *Sim) {
		b := s.placed(40_000, 0, 1)
		s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
		s.Settle()
		s.Flip(0, b)
		s.Flip(1, b)
		s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
		s.must("read", s.Read(0, layer("team/a", b), 1))
		s.must("read", s.Read(1, layer("team/a", b), 1))
	})
}

// With four origins, blobs that are pushed to a second repository by origins that don't own them stay members of it.
func TestMembershipsByOthers(t *testing.T) {
	directed(t, Options{Origins: 4}, func(s *Sim) {
		for k := range 16 {
			s.must("push", s.pushBlob(0, "team/a", content(k, 1000), Push{Hint: true}))
		}
		s.Settle()
		for k := range 16 {
			s.must("push", s.pushBlob(0, "team/b", content(k, 1000), Push{}))
		}
		s.Settle()
		s.Restore()
		s.CheckAll("after the restore")
	})
}

// An image that was deleted and pushed again outlives the loss of build-index, though an origin that was away still
// keeps the deletion.
func TestOldTombstone(t *testing.T) {
	i := NewImage("again", content(1, 100), content(2, 2000))
	for _, tag := range []string{"", "v1"} {
		for away := range 3 {
			t.Run(fmt.Sprintf("tag %q, origin %d away", tag, away+1), func(t *testing.T) {
				directed(t, Options{}, func(s *Sim) {
					s.mustPush("team/a", tag, i, Push{Hint: true})
					s.Settle()
					s.bucket.set(bucketDown) // the deletion stays at the origins
					s.must("delete", s.DeleteImage(0, "team/a", i, Push{}))
					s.Kill(away)
					s.bucket.set(bucketUp)
					s.Wait(2 * time.Minute)
					s.mustPush("team/a", tag, i, Push{Hint: true})
					s.Wait(2 * time.Minute)
					s.WipeIndex()
					s.Settle()
					s.CheckAll("after build-index' disk was lost")
					s.Restore()
					s.CheckAll("after the restore")
				})
			})
		}
	}
}

// The same for a membership.
func TestOldTombstoneOfBlob(t *testing.T) {
	b := content(1, 2000)
	for away := range 3 {
		t.Run(fmt.Sprintf("origin %d away", away+1), func(t *testing.T) {
			directed(t, Options{}, func(s *Sim) {
				s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
				s.Settle()
				s.bucket.set(bucketDown)
				s.must("delete", s.DeleteBlob(0, "team/a", b, Push{}))
				s.Kill(away)
				s.bucket.set(bucketUp)
				s.Wait(2 * time.Minute)
				s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
				s.Wait(2 * time.Minute)
				s.WipeIndex()
				s.Settle()
				s.CheckAll("after build-index' disk was lost")
				s.Restore()
				s.CheckAll("after the restore")
			})
		})
	}
}

// A deleted tag stays deleted after a second restore.
func TestDeletedTagAfterTwoRestores(t *testing.T) {
	i := NewImage("gone", content(1, 100), content(2, 2000))
	directed(t, Options{}, func(s *Sim) {
		s.mustPush("team/a", "v1", i, Push{Hint: true})
		s.Settle()
		s.bucket.set(bucketDown)
		s.must("delete", s.DeleteTag(0, "team/a", "v1", Push{}))
		s.WipeIndex()
		s.bucket.set(bucketUp)
		s.Settle()
		s.CheckAll("after the first restore")
		s.Restore()
		s.CheckAll("after the second restore")
	})
}

// A blob that is deleted right after its push stays deleted.
func TestDeleteRightAfterPush(t *testing.T) {
	for k := range 10 {
		t.Run(fmt.Sprint(k), func(t *testing.T) {
			directed(t, Options{Seed: uint64(k + 1)}, func(s *Sim) {
				b := content(k, 2000)
				s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: k%2 == 0}))
				s.Wait(time.Duration(k) * 20 * time.Millisecond)
				s.must("delete", s.DeleteBlob(0, "team/a", b, Push{}))
				s.Settle()
				s.CheckAll("")
				s.Restore()
				s.CheckAll("after the restore")
			})
		})
	}
}

// A blob that was deleted and pushed again is a member, though build-index' disk is lost before it has published that:
// the marker at the origins goes as soon as the bucket has the bytes.
func TestPushAgainAfterDeletion(t *testing.T) {
	directed(t, Options{}, func(s *Sim) {
		b := content(1, 2000)
		s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
		s.Settle()
		s.must("delete", s.DeleteBlob(0, "team/a", b, Push{}))
		s.Settle()
		s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
		s.do(Freeze, s.index) // before it can publish anything
		s.Wait(10 * time.Second)
		s.WipeIndex()
		s.Settle()
		s.CheckAll("after build-index' disk was lost")
	})
}

// A deletion of a membership outlives a manifest's row that is published after it.
func TestDeleteOfMemberOfManifest(t *testing.T) {
	i := NewImage("members", content(1, 100), content(2, 2000))
	directed(t, Options{}, func(s *Sim) {
		s.bucket.set(bucketDown)
		s.mustPush("team/a", "v1", i, Push{Hint: true})
		s.must("delete", s.DeleteBlob(0, "team/a", i.Blobs[1], Push{}))
		s.Kill(0)
		s.bucket.set(bucketUp)
		s.Settle()
		s.CheckAll("")
		s.Restore()
		s.CheckAll("after the restore")
	})
}

// An older database is known for one: what it lacks, or has of old, comes from the bucket and from origins.
func TestOlderDatabase(t *testing.T) {
	i, k := NewImage("one", content(1, 100)), NewImage("two", content(2, 100))
	for _, published := range []bool{true, false} {
		t.Run(fmt.Sprintf("published %t", published), func(t *testing.T) {
			directed(t, Options{}, func(s *Sim) {
				s.mustPush("team/a", "moved", i, Push{Hint: true})
				s.mustPush("team/a", "gone", i, Push{Hint: true})
				s.Settle()
				s.index.snapshot()
				s.mustPush("team/a", "moved", k, Push{Hint: true})
				s.mustPush("team/a", "fresh", k, Push{Hint: true})
				s.must("delete", s.DeleteTag(0, "team/a", "gone", Push{}))
				if published {
					s.Settle()
				}
				s.index.kill(false)
				s.must("revert", s.index.revert())
				s.index.start()
				s.Settle()
				s.CheckAll("after build-index went back")
				s.Restore()
				s.CheckAll("after the restore")
			})
		})
	}
}

// One origin that hangs, or vanishes without a word, costs the first request six seconds at most and the next ones two.
func TestPatience(t *testing.T) {
	for _, how := range []string{"freeze", "vanish", "part"} {
		for origin := range 3 {
			t.Run(fmt.Sprintf("%s origin %d", how, origin+1), func(t *testing.T) {
				directed(t, Options{}, func(s *Sim) { s.patience(how, origin) })
			})
		}
	}
}

func (s *Sim) patience(how string, origin int) {
	for k := range 6 {
		s.mustPush("team/a", fmt.Sprint("v", k), NewImage(fmt.Sprint(k), content(k, 300), content(10+k, 30_000)), Push{Hint: true})
	}
	s.Settle()
	switch n := s.origins[origin]; how {
	case "freeze":
		s.net.freeze(n.h, true)
	case "vanish":
		n.kill(true)
	case "part":
		for _, other := range s.nodes() {
			s.net.part(n.h, other.h, true)
		}
	}
	once := Push{Hint: true, Tries: 1}
	first := true
	measure := func(what string, f func() error) {
		most := 2 * time.Second
		if first {
			most = 6 * time.Second
		}
		first = false
		began := time.Now()
		err := f()
		took := time.Since(began)
		s.history.note("%s took %s: %s", what, took.Round(time.Millisecond), brief(err))
		if err != nil {
			s.history.violate("refused", "%s: %v", what, err)
		}
		if took > most {
			s.history.violate("slow", "%s took %s, at most %s", what, took.Round(time.Millisecond), most)
		}
	}
	for k := range 6 {
		measure("pull", func() error { return s.Read(k%2, layer("team/a", content(10+k, 30_000)), 1) })
		measure("push of a blob", func() error { return s.pushBlob(k%2, "team/a", content(20+k, 20_000), once) })
		measure("push of a manifest", func() error {
			return s.PushImage(k%2, "team/a", "x", NewImage(fmt.Sprint("x", k), content(20+k, 20_000)), Push{Skip: true, Tries: 1})
		})
	}
	s.Settle()
	s.CheckAll("")
}

// An origin that stops in the middle of an upload is replaced before the answer: two copies are owed.
func TestOriginStopsDuringUpload(t *testing.T) {
	for _, how := range []Action{Freeze, Kill, Vanish} {
		t.Run(string(how), func(t *testing.T) {
			directed(t, Options{}, func(s *Sim) {
				s.bucket.set(bucketDown)
				b := s.placed(400_000, 0, 1, 2)
				s.Wait(time.Minute)
				done := make(chan error)
				go func() { done <- s.pushBlob(0, "team/a", b, Push{Hint: true, Chunks: 20}) }()
				s.Wait(15 * time.Millisecond)
				s.disturb(Step{Do: how}, s.origins[0], s.origins[0])
				s.must("push", <-done)
				if n := len(s.owners(digest.FromBytes(b))); n < 2 {
					s.history.violate("short", "%d copies are owed", n)
				}
				s.Settle()
			})
		})
	}
}

// The database is brought back from a copy that is older than a push, right after origins have paid for its blobs: what
// they have paid is told to the build-index that starts.
func TestOlderDatabaseAfterPayment(t *testing.T) {
	for phase := range 4 { // of the lease, by which origins are told the last generation
		t.Run(fmt.Sprint(phase), func(t *testing.T) {
			directed(t, Options{}, func(s *Sim) {
				s.mustPush("team/a", "v0", NewImage("first", content(1, 3000)), Push{Hint: true})
				s.Settle()
				s.Wait(time.Duration(phase) * 500 * time.Millisecond)
				s.do(Snapshot, s.index)
				b := s.placed(5000, 0, 1)
				s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
				s.do(Freeze, s.index)
				s.Wait(5 * time.Second)
				s.do(Revert, s.index)
				s.do(Start, s.index)
				s.Wait(10 * time.Second)
				s.must("read", s.Read(0, layer("team/a", b), 5))
				s.Settle()
				s.CheckAll("after the older database")
				s.Restore()
				s.CheckAll("after the restore")
			})
		})
	}
}

// What was paid is told for as long as the build-index has not asked for it: here it is brought back from an older
// copy, and is away for longer than origins remember a payment on their own, and one of them for longer still.
func TestOlderDatabaseLongAfterPayment(t *testing.T) {
	for _, away := range []int{0, 1, 2} { // until build-index is back
		t.Run(fmt.Sprint("origin ", away+1), func(t *testing.T) {
			directed(t, Options{}, func(s *Sim) {
				b := s.placed(5000, 0, 1, 2)
				s.must("push", s.pushBlob(0, "team/b", b, Push{Hint: true}))
				s.Settle()
				s.do(Snapshot, s.index)
				s.bucket.set(bucketDown)
				s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
				s.do(Revert, s.index) // before the lease has told origins of it
				s.bucket.set(bucketUp)
				s.Wait(10 * time.Second) // it is paid
				s.Kill(away)
				s.Wait(time.Minute)
				s.do(Start, s.index)
				s.Wait(3 * time.Minute)
				s.Start(away)
				s.Settle()
				s.CheckAll("after the older database")
				s.Restore()
				s.CheckAll("after the restore")
			})
		})
	}
}

// The only origin that kept what was pushed is away while a build-index that has lost its database begins anew. What
// that origin keeps counts when it is back, however late.
func TestOnlyKeeperIsHeardLate(t *testing.T) {
	directed(t, Options{}, func(s *Sim) {
		b := s.placed(5000, 0, 1, 2)
		s.must("push", s.pushBlob(0, "team/b", b, Push{Hint: true}))
		s.Settle()
		s.Kill(0)
		s.Kill(1)
		s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true})) // to origin 3 alone
		s.Kill(2)
		s.WipeIndex()
		s.Start(0)
		s.Start(1)
		for range 7 { // whenever it is back between two looks at all origins
			s.Wait(75 * time.Second)
			s.Start(2)
			s.Wait(5 * time.Second)
			s.Kill(2)
		}
		s.Start(2)
		s.Settle()
		s.CheckAll("after the last origin is back")
		s.Restore()
		s.CheckAll("after the restore")
	})
}

// A push, a mount and a deletion are acknowledged when as many origins as there are replicas keep them, or the bucket
// has them: also the origin that is left alone writes to the bucket, whether it owns the blob or not, and whether the
// others are gone or hang. Where the bucket is down too, they are refused.
func TestAcknowledgedByOneOrigin(t *testing.T) {
	i := NewImage("image", content(1, 5000), content(2, 3000), content(3, 700), content(4, 40))
	before, mounted := NewImage("before", content(5, 100)), content(6, 300)
	for _, origins := range []int{2, 3} {
		for left := range origins {
			for _, how := range []Action{Kill, Freeze} {
				for _, bucket := range []bucketMode{bucketUp, bucketDown} {
					t.Run(fmt.Sprintf("origin %d of %d, %s, bucket up %t", left+1, origins, how, bucket == bucketUp), func(t *testing.T) {
						directed(t, Options{Origins: origins}, func(s *Sim) {
							s.mustPush("team/a", "gone", before, Push{})
							s.must("push", s.pushBlob(0, "team/b", mounted, Push{}))
							s.Settle()
							s.bucket.set(bucket)
							for o := range s.origins {
								if o != left {
									s.do(how, s.origins[o])
								}
							}
							for k, err := range []error{
								s.PushImage(0, "team/a", "v", i, Push{}), s.Mount(0, "team/a", "team/b", mounted, Push{}), s.DeleteTag(0, "team/a", "gone", Push{}),
							} {
								if (err == nil) != (bucket == bucketUp) {
									s.history.violate("refused", "change %d with one origin, and bucket up %t: %v", k, bucket == bucketUp, err)
								}
							}
							s.Wipe(left)
							for o := range s.origins {
								s.do(Thaw, s.origins[o])
								s.Start(o)
							}
							s.WipeIndex()
							s.Settle()
							s.CheckAll("after the only origin and the database were lost")
						})
					})
				}
			}
		}
	}
}

// A read of what the bucket alone has waits for a bucket that is away for a moment, and for origins that restart.
func TestReadWaits(t *testing.T) {
	directed(t, Options{}, func(s *Sim) {
		b := content(1, 5000)
		s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true}))
		s.Settle()
		for o := range s.origins {
			s.Wipe(o)
			s.Start(o)
		}
		s.Wait(time.Minute)
		for _, away := range []string{"bucket", "origins"} {
			s.bucket.set(bucketDown)
			if away == "origins" {
				s.bucket.set(bucketUp)
				for o := range s.origins {
					s.Kill(o)
				}
			}
			done := make(chan error)
			go func() { done <- s.Read(0, layer("team/a", b), 1) }()
			s.Wait(6 * time.Second)
			s.bucket.set(bucketUp)
			for o := range s.origins {
				s.Start(o)
			}
			s.must("read while "+away+" were away", <-done)
		}
	})
}

// An owner whose copy has rotted does not take over the debt of an origin that drops its own copy then.
func TestDebtToRottenCopy(t *testing.T) {
	directed(t, Options{Origins: 4}, func(s *Sim) {
		b := s.placed(5000, 0, 1, 2, 3)
		s.bucket.set(bucketDown)
		s.Kill(2)
		s.Kill(3)
		s.must("push", s.pushBlob(0, "team/a", b, Push{Hint: true})) // to both owners
		s.Wait(time.Minute)
		s.Flip(1, b)
		s.Kill(0)
		s.Kill(1)
		s.Start(2)
		s.Start(3)
		s.Wait(20 * time.Second)
		s.must("push again", s.pushBlob(0, "team/a", b, Push{})) // to the others
		s.Start(0)
		s.Start(1)
		s.Wait(time.Minute)
		s.Wipe(0)
		s.Start(0)
		s.bucket.set(bucketUp)
		s.Settle()
		s.CheckAll("after a disk was lost")
	})
}

// A manifest of a blob whose copies were all lost with their disks never gets to the bucket. Once everything else is
// lost as well it is gone, and its tag is what it was before: three disks were lost, and that is no fault of the
// cluster.
func TestManifestOfALostBlob(t *testing.T) {
	directed(t, Options{}, func(s *Sim) {
		before, after := NewImage("before", content(1, 700)), NewImage("after", content(2, 5000))
		s.mustPush("team/a", "v", before, Push{})
		s.Settle()
		s.bucket.set(bucketHung)
		s.Kill(0)
		s.mustPush("team/a", "v", after, Push{}) // to origins 2 and 3 alone
		s.Wipe(1)
		s.Wipe(2)
		for o := range s.origins {
			s.Start(o)
		}
		s.Settle()
		s.CheckAll("after both copies were lost")
		s.Restore()
		s.CheckAll("after the restore")
		s.CheckAll("again")
	})
}
