package cluster

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func TestRereads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRereads(10*time.Second, 100)
		if r.Again("a") {
			t.Error("never read")
		}
		r.Read("a")
		time.Sleep(9 * time.Second)
		if !r.Again("a") || r.Again("a") {
			t.Error("the second reading is told once")
		}
		r.Read("a")
		time.Sleep(11 * time.Second)
		if r.Again("a") {
			t.Error("too late")
		}
		for i := range 10_000 {
			r.Read(fmt.Sprint(i))
		}
		if n := len(r.fresh) + len(r.old); n > 200 {
			t.Errorf("%d are remembered", n)
		}
		if !r.Again("9999") {
			t.Error("the latest is forgotten")
		}
	})
}
