package buildindex

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// extended serves the extension of a build-index, and returns a client of it.
func (r *rig) extended() *cluster.IndexClient {
	r.Helper()
	r.must(r.x.takeOver(r.Context()))
	serve, err := r.x.extension()
	if err != nil {
		r.Fatal(err)
	}
	srv := httptest.NewServer(registry.Server{Dialect: cluster.Dialect(), Extension: serve}.Handler())
	r.Cleanup(srv.Close)
	c, err := cluster.NewIndexClient(srv.URL, srv.Client())
	if err != nil {
		r.Fatal(err)
	}
	return c
}

// Each robot that is put is another, whatever whoever puts it says of itself, and of the time.
func TestRobotsAreTold(t *testing.T) {
	r := newRig(t)
	c := r.extended()
	seen := map[string]bool{}
	for range 3 {
		b := cluster.Robot{Name: "ci", Hash: strings.Repeat("a", 64), Created: time.Now().Add(time.Hour), Expires: time.Now().Add(24 * time.Hour), Generation: "mine"}
		r.must(c.PutRobot(t.Context(), b))
		s, err := c.Access(t.Context(), cluster.AccessState{})
		if err != nil || len(s.Robots) != 1 {
			t.Fatalf("%+v, %v", s, err)
		}
		if got := s.Robots[0]; seen[got.Generation] || len(got.Generation) < 20 || got.Created.After(time.Now()) {
			t.Errorf("a robot is %+v", got)
		}
		seen[s.Robots[0].Generation] = true
	}
}

// Keys of proxies that are gone make room for those that come: nobody is refused, and one owner, however often it
// starts, takes no other's place.
func TestKeysNeverRunOut(t *testing.T) {
	r := newRig(t)
	c := r.extended()
	now := time.Now()
	put := func(owner string, i int, end time.Time) {
		k := cluster.TokenKey{ID: fmt.Sprintf("%s-%d", owner, i), JWK: []byte("{}"), Expires: end, Owner: owner}
		v, err := json.Marshal(k)
		r.must(err)
		r.must(r.x.db.Update(t.Context(), func(tx names.Tx) error {
			return tx.PutAccess(names.AccessEntry{Kind: kindKey, Name: k.ID, Value: v, Expires: end.Unix()})
		}))
	}
	for i := range cluster.MaxOwnKeys {
		put("127.0.0.1", i, now.Add(time.Duration(i+1)*time.Minute))
	}
	for i := range cluster.MaxTokenKeys - cluster.MaxOwnKeys {
		put("others", i, now.Add(time.Hour))
	}
	for i := range 3 {
		r.must(c.PutTokenKey(t.Context(), cluster.TokenKey{ID: fmt.Sprint("new", i), JWK: []byte("{}"), Expires: now.Add(2 * time.Hour), Owner: "others"}))
	}
	s, err := c.Access(t.Context(), cluster.AccessState{})
	r.must(err)
	have := map[string]int{}
	ids := map[string]bool{}
	for _, k := range s.Keys {
		have[k.Owner]++
		ids[k.ID] = true
	}
	if have["127.0.0.1"] != cluster.MaxOwnKeys || have["others"] != cluster.MaxTokenKeys-cluster.MaxOwnKeys || !ids["new0"] || !ids["new2"] || ids["127.0.0.1-2"] || !ids["127.0.0.1-3"] {
		t.Errorf("%v; the first ones %v %v", have, ids["127.0.0.1-2"], ids["127.0.0.1-3"])
	}
	// An owner with few keys comes to a full table.
	put("10.9.9.9", 0, now.Add(time.Second*30))
	r.must(c.PutTokenKey(t.Context(), cluster.TokenKey{ID: "new3", JWK: []byte("{}"), Expires: now.Add(2 * time.Hour)}))
	s, err = c.Access(t.Context(), cluster.AccessState{})
	r.must(err)
	if len(s.Keys) > cluster.MaxTokenKeys {
		t.Errorf("%d keys", len(s.Keys))
	}
}

// Who asks again is told what has changed since, and robots are fewer than one answer can have.
func TestAccessIsToldOnce(t *testing.T) {
	r := newRig(t)
	c := r.extended()
	robot := func(name string) cluster.Robot {
		return cluster.Robot{Name: name, Hash: strings.Repeat("a", 64), Expires: time.Now().Add(time.Hour), Note: strings.Repeat("x", 3500)}
	}
	r.must(c.PutRobot(t.Context(), robot("ci")))
	first, err := c.Access(t.Context(), cluster.AccessState{})
	if err != nil || first.ETag == "" {
		t.Fatalf("%q, %v", first.ETag, err)
	}
	again := first
	again.Robots = nil // what is returned is what was had
	if got, err := c.Access(t.Context(), again); err != nil || got.Robots != nil || got.ETag != first.ETag {
		t.Errorf("nothing has changed: %+v, %v", got, err)
	}
	r.must(c.PutRobot(t.Context(), robot("ci")))
	if got, err := c.Access(t.Context(), first); err != nil || len(got.Robots) != 1 || got.Robots[0].Generation == first.Robots[0].Generation {
		t.Errorf("a robot was put again: %+v, %v", got, err)
	}
	value, err := json.Marshal(robot("x"))
	r.must(err)
	end := time.Now().Add(time.Hour).Unix()
	r.must(r.x.db.Update(t.Context(), func(tx names.Tx) error {
		for i := range cluster.MaxRobotsSize / len(value) {
			if err := tx.PutAccess(names.AccessEntry{Kind: kindRobot, Name: fmt.Sprint("x", i), Value: value, Expires: end}); err != nil {
				return err
			}
		}
		return nil
	}))
	if err := c.PutRobot(t.Context(), robot("more")); !errors.Is(err, registry.ErrTooManyRequests) {
		t.Errorf("a robot too many: %v", err)
	}
	if got, err := c.Access(t.Context(), first); err != nil || len(got.Robots) < 2000 {
		t.Errorf("as many as there may be: %d, %v", len(got.Robots), err)
	}
}
